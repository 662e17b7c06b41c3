"""transformers' pipeline behind FastAPI and uvicorn: reviews wait for one thread, which runs them one by one.

    uvicorn benchmarks.peers.fastapi_app:app --port 8100
    curl localhost:8100/classify -H 'Content-Type: application/json' -d '{"text": "Amazing movie!"}'

As https://huggingface.co/docs/transformers/pipeline_webserver sets it up: the web server takes the light load, and one
thread, which is the queue here, the heavy one.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from pydantic import BaseModel

from benchmarks.peers import model
from benchmarks.peers.model import Answer


class Review(BaseModel):
    """The body of a request."""

    text: str


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[None]:
    """Loads the model before the first request."""
    application.state.classify = model.load() if model.engine() == "shipped" else model.pipeline()
    with ThreadPoolExecutor(max_workers=1) as thread:
        application.state.thread = thread
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(review: Review, request: Request) -> Answer:
    """Answers one review."""
    state = request.app.state
    answers = await asyncio.get_running_loop().run_in_executor(state.thread, state.classify, [review.text])
    answer: Answer = answers[0]
    return answer
