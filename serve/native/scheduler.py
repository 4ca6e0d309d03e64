"""Who computes what in the next step: pure logic, without threads and without a clock.

A step holds one token of every sequence that is past its prompt, and `prompt_budget` tokens of
prompts on top, so neither kind of work waits for the other. Of the budget

- half goes to the prompt admitted first, so that none starves;
- the rest goes round the clients, the shortest prompt of each first: a short prompt does not wait
  for a long one, nor a client for the other prompts of another.

Clients take turns to be admitted; the requests of one come in order. A sequence is admitted when
its tokens and the next one fit into free pages and one page is left for each that runs. A client
none of whose sequences runs is before all others, and need not wait for one that has several: the
youngest of the client that has most goes back to its queue. So does the youngest of all if no page
is left for the next token. What goes back keeps its tokens; they are computed again, as far as
their pages have been taken by others.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from secateur.serve.native.pages import START, PagePool


class Sequence:
    """A prompt and the tokens that follow it, on its way through the scheduler.

    Args:
        prompt: token ids, at least one.
        client: whose it is.
        submitted: when it came, in seconds of any clock.
        reuse: whether pages that others computed may be used.

    Attributes:
        tokens: of prompt and output; append what was chosen.
        computed: how many of them are in the cache.
        pages: the pages of the cache, in order.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        *,
        client: str = "",
        submitted: float = 0.0,
        reuse: bool = True,
    ) -> None:
        self.tokens = list(prompt)
        self.client = client
        self.submitted = submitted
        self.reuse = reuse
        self.order = 0
        self.forget()

    def forget(self) -> None:
        """Nothing of it is in the cache."""
        self.computed = 0
        self.pages = array("i")
        self.known = 0  # pages that others can find
        self.serial = START  # of the last of them

    @property
    def cancelled(self) -> bool:
        """Nobody wants it any more."""
        return False

    @property
    def remaining(self) -> int:
        """Tokens that have to be computed before the next one can be chosen."""
        return len(self.tokens) - self.computed


S = TypeVar("S", bound=Sequence)
Plan = list[tuple[S, int]]


class Scheduler(Generic[S]):
    """See the module.

    Args:
        pool: the pages of the model's cache; every sequence alone must fit into them.
        max_running: sequences of a step.
        prompt_budget: prompt tokens of a step.
        deadline: seconds that a sequence may take since it was submitted; None: any.

    Attributes:
        running: admitted sequences, the oldest first.
        waiting: how many sequences wait.
        preemptions: how often a running sequence was sent back.
        prefix_queries: tokens looked up in the prefix cache.
        prefix_hits: those found there.
    """

    def __init__(
        self, pool: PagePool, *, max_running: int, prompt_budget: int, deadline: float | None = None
    ) -> None:
        if max_running < 1 or prompt_budget < 2:
            raise ValueError("max_running must be at least 1, prompt_budget at least 2")
        self.pool = pool
        self.max_running = max_running
        self.prompt_budget = prompt_budget
        self.deadline = float("inf") if deadline is None else deadline
        self.running: list[S] = []
        self.waiting = 0
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._queues: OrderedDict[str, deque[S]] = OrderedDict()  # next client first
        self._admitted = 0

    def __iter__(self) -> Iterator[S]:
        """All sequences, running and waiting."""
        yield from self.running
        for queue in self._queues.values():
            yield from queue

    def add(self, sequence: S) -> None:
        """Let a sequence wait for its turn."""
        self._queues.setdefault(sequence.client, deque()).append(sequence)
        self.waiting += 1

    def finish(self, sequence: S) -> None:
        """Let go of a running sequence."""
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.forget()

    def sweep(self, now: float) -> list[S]:
        """Let go of what is cancelled or too late, wherever it is.

        Returns:
            Those that are too late.
        """
        gone = [one for one in self if one.cancelled or now - one.submitted > self.deadline]
        for sequence in gone:
            if sequence in self.running:
                self.finish(sequence)
            else:
                self._queues[sequence.client].remove(sequence)
                self._leave_queue(sequence.client)
        return [one for one in gone if not one.cancelled]

    def clear(self) -> list[S]:
        """Let go of all sequences, and return them."""
        everything = list(self)
        for sequence in self.running:
            self.pool.release(sequence.pages)
        self.running.clear()
        self._queues.clear()
        self.waiting = 0
        return everything

    def plan(self) -> Plan[S]:
        """Decide on the next step: sequences and how many of their tokens to compute.

        The pages of those tokens are there. Empty only if nothing runs and nothing waits.
        """
        for sequence in list(self.running):
            if sequence.remaining == 1 and sequence.pages:  # not preempted in this loop
                self._grow(sequence)
        while self._queues and self._admit(self._next_client()):
            pass
        decodes = [(one, 1) for one in self.running if one.remaining == 1]
        return decodes + self._prompts([one for one in self.running if one.remaining > 1])

    def advance(self, sequence: S, count: int) -> None:
        """Note that ``count`` more tokens of a sequence are in the cache."""
        sequence.computed += count
        size = self.pool.page_tokens
        while (sequence.known + 1) * size <= sequence.computed:
            text = self._next_text(sequence)
            page = self.pool.learn(sequence.pages[sequence.known], sequence.serial, text)
            self._adopt(sequence, page)

    def _grow(self, sequence: S) -> None:
        """Make sure that there is a page for the next token."""
        while len(sequence.pages) * self.pool.page_tokens < len(sequence.tokens):
            if self.pool.free:
                sequence.pages.append(self.pool.take())
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return

    def _preempt(self, sequence: S) -> None:
        self.finish(sequence)
        self._queues.setdefault(sequence.client, deque()).appendleft(sequence)
        self.waiting += 1
        self.preemptions += 1

    def _leave_queue(self, client: str) -> None:
        self.waiting -= 1
        if not self._queues[client]:
            del self._queues[client]

    def _next_client(self) -> str:
        """Whose turn it is: first of those that have nothing running."""
        busy = {one.client for one in self.running}
        return next((one for one in self._queues if one not in busy), next(iter(self._queues)))

    def _admit(self, client: str) -> bool:
        """Admit the next sequence of a client, or make room for it; False if it has to wait."""
        sequence = self._queues[client][0]
        if len(self.running) >= self.max_running or not self._allot(sequence):
            return self._make_room(client)
        self._admitted += 1
        sequence.order = self._admitted
        self.running.append(sequence)
        self._queues[client].popleft()
        self._queues.move_to_end(client)
        self._leave_queue(client)
        return True

    def _allot(self, sequence: S) -> bool:
        """Give a waiting sequence the pages of its tokens, if they are to be had."""
        found, size = self._look_up(sequence), self.pool.page_tokens
        missing = len(sequence.tokens) // size + 1 - len(sequence.pages)  # with the next token's
        if self.running and self.pool.free - missing < len(self.running):
            self.pool.release(sequence.pages)
            sequence.forget()
            return False
        while len(sequence.pages) * size < len(sequence.tokens):
            sequence.pages.append(self.pool.take())
        if sequence.reuse:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += found
        return True

    def _make_room(self, client: str) -> bool:
        """Send back a sequence of the client that has most, for one that has none running."""
        shares = Counter(one.client for one in self.running)
        richest, most = shares.most_common(1)[0]
        if shares[client] or most < 2:
            return False
        self._preempt([one for one in self.running if one.client == richest][-1])
        return True

    def _prompts(self, prompts: list[S]) -> Plan[S]:
        """Share the budget out; see the module."""
        for sequence in prompts:
            self.prefix_hits += self._look_up(sequence)
        turns: Counter[str] = Counter()
        ranked = []
        for sequence in sorted(prompts, key=lambda one: (one.remaining, one.order)):
            ranked.append((turns[sequence.client], sequence.remaining, sequence.order, sequence))
            turns[sequence.client] += 1
        counts: dict[S, int] = {}
        coming: set[tuple[int, tuple[int, ...]]] = set()
        left = self.prompt_budget
        shares = [(one, self.prompt_budget // 2) for one in prompts[:1]]
        for sequence, most in shares + [(one, left) for *_, one in sorted(ranked)]:
            page = (sequence.serial, self._next_text(sequence))
            if sequence not in counts and sequence.reuse and page in coming:
                continue  # another one computes that page in this step
            coming.add(page)
            before = counts.get(sequence, 0)
            more = min(left, most, sequence.remaining - before)
            if more:
                counts[sequence] = before + more
            left -= more
        return list(counts.items())

    def _look_up(self, sequence: S) -> int:
        """Use known pages for what has to be computed next, but never for the last token.

        Returns:
            Tokens found.
        """
        size, before = self.pool.page_tokens, sequence.computed
        while (
            sequence.reuse
            and sequence.computed == sequence.known * size
            and sequence.computed + size < len(sequence.tokens)
        ):
            page = self.pool.find(sequence.serial, self._next_text(sequence))
            if page is None:
                break
            self.pool.hold(page)
            if sequence.known < len(sequence.pages):
                self.pool.release([sequence.pages[sequence.known]])
            self._adopt(sequence, page)
            sequence.computed += size
        return sequence.computed - before

    def _next_text(self, sequence: S) -> tuple[int, ...]:
        """The tokens of the first page that is not known."""
        start = sequence.known * self.pool.page_tokens
        return tuple(sequence.tokens[start : start + self.pool.page_tokens])

    def _adopt(self, sequence: S, page: int) -> None:
        """Note that the next page of a sequence is a known one."""
        sequence.pages[sequence.known : sequence.known + 1] = array("i", [page])
        sequence.known += 1
        sequence.serial = self.pool.serial(page)
