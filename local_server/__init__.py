"""Triton out of the nvidia-pytriton wheel, on this machine: what serve.py is made of."""
