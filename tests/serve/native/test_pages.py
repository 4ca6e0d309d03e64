"""The pages of the cache against plain lists."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.serve.native.pages import START, PagePool

Text = tuple[tuple[int, int], ...]  # tokens of its pages
CONTENTS = [(0, 0), (0, 1), (1, 0)]
TEXTS: list[Text] = [text for length in (1, 2, 3) for text in product(CONTENTS, repeat=length)]


class Books:
    """Readers of texts come and go; beside the pool stands what it should know, in plain lists."""

    def __init__(self, pages: int) -> None:
        self.pool = PagePool(pages, 2)
        self.readers: list[tuple[list[Text], list[int]]] = []  # texts up to each page; the pages
        self.resting: list[Text] = []  # the first to be forgotten first
        self.blank = pages

    def held(self, text: Text) -> bool:
        return any(text in texts for texts, _ in self.readers)

    def take(self) -> int:
        if self.blank:
            self.blank -= 1
        else:
            self.resting.pop(0)
        return self.pool.take()

    def read(self, text: Text, look: bool) -> None:
        """Hold what is known of a text (if the reader looks), compute the rest."""
        texts: list[Text] = []
        pages: list[int] = []
        self.readers.append((texts, pages))
        before = START
        for end in range(1, len(text) + 1):
            prefix, tokens = text[:end], text[end - 1]
            page = self.pool.find(before, tokens) if look else None
            if page is not None:
                assert prefix in self.resting or self.held(prefix)
                self.pool.hold(page)
            elif self.pool.free:
                own = self.take()
                page = self.pool.learn(own, before, tokens)
                assert (page != own) == (prefix in self.resting or self.held(prefix))
                self.blank += page != own
            else:
                with pytest.raises(IndexError):
                    self.pool.take()
                return
            if prefix in self.resting:
                self.resting.remove(prefix)
            texts.append(prefix)
            pages.append(page)
            before = self.pool.serial(page)

    def leave(self, which: int) -> None:
        texts, pages = self.readers.pop(which % len(self.readers))
        self.pool.release(pages)
        self.resting += [text for text in reversed(texts) if not self.held(text)]

    def check(self) -> None:
        self.pool.check([pages for _, pages in self.readers])
        assert self.pool.free == self.blank + len(self.resting)
        assert self.pool.used == len({text for texts, _ in self.readers for text in texts})
        for text in TEXTS:
            page, before = None, START
            for tokens in text:
                page = self.pool.find(before, tokens)
                if page is None:
                    break
                before = self.pool.serial(page)
            assert (page is not None) == (text in self.resting or self.held(text))


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(TEXTS), st.booleans()) | st.integers(0, 5), max_size=30),
)
def test_texts_are_found_until_their_page_is_the_oldest(
    pages: int, steps: list[tuple[Text, bool] | int]
) -> None:
    books = Books(pages)
    for step in steps:
        if isinstance(step, tuple):
            books.read(*step)
        elif books.readers:
            books.leave(step)
        books.check()
    while books.readers:
        books.leave(0)
    books.check()
    assert books.pool.used == 0


def test_equal_hashes_do_not_mix_texts() -> None:
    assert hash((-1, 0)) == hash((-2, 0))  # a weakness of Python's integers
    pool = PagePool(2, 2)
    page = pool.learn(pool.take(), START, (-1, 0))
    assert pool.find(START, (-2, 0)) is None
    assert pool.learn(pool.take(), START, (-2, 0)) != page


def test_the_check_finds_wrong_books() -> None:
    pool = PagePool(3, 2)
    page = pool.take()
    pool.check([[page]])
    with pytest.raises(RuntimeError, match="lost"):
        pool.check([])
    with pytest.raises(RuntimeError, match="holders"):
        pool.check([[page], [page]])
