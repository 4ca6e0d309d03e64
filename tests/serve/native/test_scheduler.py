"""The scheduler without a model: fairness, and who writes to which page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.serve.native.pages import PagePool
from secateur.serve.native.scheduler import Plan, Scheduler
from secateur.serve.native.scheduler import Sequence as Scheduled


class Asked(Scheduled):
    """A prompt that wants some tokens."""

    def __init__(
        self, prompt: Sequence[int], wanted: int = 1, client: str = "", reuse: bool = True
    ) -> None:
        super().__init__(tuple(prompt), client=client, reuse=reuse)
        self.prompt = len(prompt)
        self.wanted = wanted
        self.gone = False

    @property
    def cancelled(self) -> bool:
        return self.gone

    @property
    def output(self) -> int:
        return len(self.tokens) - self.prompt


def make(pages: int = 1000, page_tokens: int = 4, **options: int) -> Scheduler[Asked]:
    defaults = {"max_running": 8, "prompt_budget": 32}
    return Scheduler(PagePool(pages, page_tokens), **{**defaults, **options})


def step(scheduler: Scheduler[Asked]) -> Plan[Asked]:
    """Compute a plan as the engine does; the tokens chosen depend on the text alone."""
    plan = scheduler.plan()
    check(scheduler, plan)
    for one, count in plan:
        ready = one.remaining == count
        scheduler.advance(one, count)
        if ready:
            one.tokens.append(sum(one.tokens) % 5)
            if one.output == one.wanted:
                scheduler.finish(one)
    return plan


def check(scheduler: Scheduler[Asked], plan: Plan[Asked]) -> None:
    pool, size = scheduler.pool, scheduler.pool.page_tokens
    pool.check([one.pages for one in scheduler.running])
    holders = Counter(page for one in scheduler.running for page in one.pages)
    known = set(pool._text)
    prompts = [(one, count) for one, count in plan if one.remaining > 1]
    assert sum(count for _, count in prompts) <= scheduler.prompt_budget
    assert len({id(one) for one, _ in plan}) == len(plan) <= len(scheduler.running)
    assert len(scheduler.running) <= scheduler.max_running
    planned = dict(plan)
    for one in scheduler.running:
        if one.remaining == 1 and one.output:
            assert planned[one] == 1  # whoever is past its prompt gets a token in every step
    for one, count in plan:
        assert 1 <= count <= one.remaining
        end = one.computed + count
        assert len(one.pages) * size >= end
        for page in one.pages[one.computed // size : -(-end // size)]:
            assert holders[page] == 1  # nobody else's page is written to
            assert page not in known
    waiting = sum(map(len, scheduler._queues.values()))
    assert scheduler.waiting == waiting
    assert plan or not waiting


asked = st.builds(
    Asked,
    st.builds(
        lambda keep, rest: [*([1, 2, 3, 0] * 5)[:keep], *rest],
        st.integers(0, 20),
        st.lists(st.integers(0, 3), min_size=1, max_size=20),
    ),
    st.integers(1, 20),
    st.sampled_from("abc"),
    st.booleans(),
)
gaps = st.sampled_from([0, 0, 0, 1, 2, 5])
patience = st.sampled_from([1000, 1000, 1000, 0, 1, 3])


@given(
    st.lists(st.tuples(asked, gaps, patience), min_size=1, max_size=15),
    st.integers(11, 40),
    st.integers(1, 6),
    st.integers(2, 24),
)
def test_everything_ends_and_every_page_comes_back(
    visits: list[tuple[Asked, int, int]], pages: int, max_running: int, budget: int
) -> None:
    scheduler = make(pages + 5, max_running=max_running, prompt_budget=budget)
    everyone: list[tuple[Asked, int]] = []
    for one, gap, steps in visits:
        for _ in range(gap):
            step(scheduler)
        scheduler.add(one)
        everyone.append((one, steps))
    for now in range(1000):
        for one, steps in everyone:
            one.gone |= now >= steps and one.output < one.wanted
        assert scheduler.sweep(0.0) == []
        if not step(scheduler):
            break
    for one, _ in everyone:
        assert one.gone or one.output == one.wanted
        text = one.tokens[: one.prompt]
        for _ in range(one.output):
            text.append(sum(text) % 5)
        assert one.tokens == text
    assert scheduler.pool.used == 0
    assert scheduler.waiting == 0


def first_token(scheduler: Scheduler[Asked], one: Asked, most: int = 1000) -> int:
    """Steps until the first token of a request."""
    scheduler.add(one)
    for steps in range(1, most + 1):
        step(scheduler)
        if one.output:
            return steps
    raise AssertionError("no token")


@given(
    flood=st.integers(2, 40),
    length=st.integers(1, 60),
    outputs=st.integers(1, 50),
    head_start=st.integers(1, 30),
    prompt=st.integers(1, 8),
    pages=st.sampled_from([60, 1000]),
)
def test_a_flood_of_one_client_does_not_delay_another(
    flood: int, length: int, outputs: int, head_start: int, prompt: int, pages: int
) -> None:
    """A prompt of at most a quarter of the budget is read in the step after it came."""
    scheduler = make(pages)
    for one in range(flood):
        scheduler.add(Asked([one % 7, *[one] * (length - 1)], outputs, "flood"))
    for _ in range(head_start):
        step(scheduler)
    assert first_token(scheduler, Asked([9] * prompt, client="other"), 1) == 1


@given(st.lists(st.integers(100, 400), min_size=1, max_size=5), st.integers(1, 8))
def test_a_short_prompt_does_not_wait_for_long_ones(longs: list[int], prompt: int) -> None:
    scheduler = make()
    for place, length in enumerate(longs):
        scheduler.add(Asked([place] * length))
    step(scheduler)
    assert first_token(scheduler, Asked([9] * prompt), 1) == 1


@given(st.integers(30, 400), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_long_prompt_does_not_starve(length: int, shorts: list[int]) -> None:
    """However many short prompts come, half of the budget is for the one admitted first."""
    scheduler = make()
    long = Asked([7] * length)
    scheduler.add(long)
    steps = 0
    while not long.output:
        for place, short in enumerate(shorts):
            scheduler.add(Asked([place, steps] * short, client=str(place)))
        step(scheduler)
        steps += 1
    assert steps <= -(-length // 16)


def order_of_first_tokens(scheduler: Scheduler[Asked], everyone: dict[str, Asked]) -> str:
    order = ""
    while len(order) < len(everyone):
        step(scheduler)
        for name, one in everyone.items():
            if one.output and name not in order:
                order += name
    return order


def test_clients_take_turns() -> None:
    scheduler = make(max_running=1)
    everyone = {
        name: Asked([place], client=client)
        for place, (name, client) in enumerate(zip("ABCDEF", "xxxyzz", strict=True))
    }
    for one in everyone.values():
        scheduler.add(one)
    assert order_of_first_tokens(scheduler, everyone) == "ADEBFC"


def test_equal_prompts_of_one_client_come_in_order() -> None:
    scheduler = make()
    everyone = {name: Asked([place] * 40) for place, name in enumerate("ABCDEF")}
    for one in everyone.values():
        scheduler.add(one)
    assert order_of_first_tokens(scheduler, everyone) == "ABCDEF"


def test_the_youngest_gives_its_pages_back_and_is_next() -> None:
    scheduler = make(pages=5)
    old, young, later = (Asked([place] * 4, 9, client) for place, client in enumerate("aab"))
    for one in (old, young):
        scheduler.add(one)
    while not scheduler.preemptions:
        step(scheduler)
    assert scheduler.running == [old]
    assert young.output > 0
    assert not young.pages
    scheduler.add(later)
    kept = list(young.tokens)
    while young.output < young.wanted:
        step(scheduler)
        assert young.tokens[: len(kept)] == kept
    assert old.output == old.wanted


def test_what_was_computed_before_is_found_again() -> None:
    scheduler = make(pages=20)
    first = Asked(range(18), 3)
    assert first_token(scheduler, first) == 1
    while first.output < first.wanted:
        step(scheduler)
    again = Asked([*range(16), 9])
    scheduler.add(again)
    assert step(scheduler) == [(again, 1)]
    assert scheduler.prefix_hits == 16
    scheduler.add(whole := Asked(range(16)))
    assert step(scheduler) == [(whole, 4)]  # logits are needed: the last page is computed anew
    scheduler.add(alone := Asked(range(16), reuse=False))
    assert step(scheduler) == [(alone, 16)]
    assert scheduler.prefix_queries == 18 + 17 + 16


@pytest.mark.parametrize("late", [lambda one: one.output > 0, lambda one: not one.pages])
def test_the_deadline_counts_from_the_submission(late: Callable[[Asked], bool]) -> None:
    scheduler = Scheduler[Asked](PagePool(9, 4), max_running=1, prompt_budget=8, deadline=10.0)
    running, waiting = Asked([1], 99), Asked([2], 99)
    running.submitted, waiting.submitted = 100.0, 100.5
    for one in (running, waiting):
        scheduler.add(one)
    step(scheduler)
    assert scheduler.sweep(110.0) == []
    assert scheduler.sweep(110.2) == [running]
    assert scheduler.sweep(111.0) == [waiting]
    assert not step(scheduler)
    assert scheduler.pool.used == 0


def test_impossible_limits() -> None:
    with pytest.raises(ValueError, match="at least"):
        make(max_running=0)
    with pytest.raises(ValueError, match="at least"):
        make(prompt_budget=1)
