"""This service beside its in-process ceiling and other serving frameworks, in one run on the same cores."""
