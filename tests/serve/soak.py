"""Mixed load for as long as one likes, and what the server's memory does meanwhile.

python tests/serve/soak.py MODEL MINUTES      the whole of it, by itself; `make soak` has 30 minutes
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import psutil

if __package__:
    from .conftest import Server, start_server
else:
    from conftest import Server, start_server

CLIENTS = 12
WORDS = Path(__file__).read_text(encoding="utf-8").split()


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))[:400]


async def _complete(client: httpx.AsyncClient, chance: random.Random) -> None:
    body = {
        "prompt": _text(chance, chance.choice([3, 30, 100])),
        "max_tokens": chance.randint(1, 40),
        "temperature": chance.choice([0, 1]),
        "top_p": chance.choice([0.5, 1]),
        "n": chance.choice([1, 1, 3]),
        "logprobs": chance.choice([None, 2]),
        "echo": chance.random() < 0.2,
        "user": str(chance.randint(0, 3)),
    }
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code in (200, 429), answer.text


async def _stream(client: httpx.AsyncClient, chance: random.Random) -> None:
    """A stream that may be left in the middle."""
    body = {"prompt": _text(chance, 20), "max_tokens": 60, "stream": True, "ignore_eos": True}
    leave = chance.choice([3, 10**9])
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = 0
        async for _ in answer.aiter_lines():
            lines += 1
            if lines > leave:
                return


async def _nonsense(client: httpx.AsyncClient, chance: random.Random) -> None:
    answer = await client.post("/v1/completions", content=chance.randbytes(200))
    assert answer.status_code == 400


async def soak(server: Server, seconds: float, pause: float) -> list[int]:
    """Load a server; the bytes of its resident memory, every ``pause`` seconds."""
    process, resident = psutil.Process(server.process.pid), list[int]()
    end = time.monotonic() + seconds
    kinds: list[Callable[[httpx.AsyncClient, random.Random], Awaitable[None]]]
    kinds = [_complete, _complete, _complete, _stream, _stream, _nonsense]

    async def load(number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            while time.monotonic() < end:
                await chance.choice(kinds)(client, chance)

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(pause)
            resident.append(process.memory_info().rss)

    await asyncio.gather(watch(), *(load(number) for number in range(CLIENTS)))
    return resident


def growth(resident: list[int]) -> float:
    """How much more is held at the end than after a third of the time: a ratio of medians."""
    third = len(resident) // 3
    middle, last = sorted(resident[third : 2 * third]), sorted(resident[-third:])
    return last[third // 2] / middle[third // 2] - 1


if __name__ == "__main__":
    running = start_server(Path(sys.argv[1]), "--engine", "native", "--kv-cache-memory", "64MiB")
    held = asyncio.run(soak(running, float(sys.argv[2]) * 60, 5.0))
    for at in range(0, len(held), max(1, len(held) // 12)):
        print(f"{at * 5 / 60:5.1f} min  {held[at] / 2**20:.1f} MiB")
    pages = running.metric("kv_cache_usage_perc")
    requests = running.metric("prompt_tokens_total")
    print(f"{requests:.0f} prompt tokens; KV pages in use afterwards: {pages:g}")
    print(f"growth from the middle third to the last: {100 * growth(held):+.2f} %")
    code = running.stop()
    sys.exit(code or int(growth(held) > 0.02 or pages > 0))
