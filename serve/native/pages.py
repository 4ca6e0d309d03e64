"""The pages of the KV cache: who holds which, and which texts lie in them.

A full page is known by its tokens and by the page before it, so a known page stands for one text
from its beginning; tokens are compared, not hashes alone. A page that nobody holds keeps its text
until it is needed for another: the one unused for the longest time goes first, and of the pages
given back together the last of the text.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

START = 0  # stands for "no page before"

_Key = tuple[int, tuple[int, ...]]


class PagePool:
    """Hands out pages; who got one holds it until it is released.

    Args:
        pages: how many there are, numbered from 0.
        page_tokens: tokens of a page.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._blank = list(range(pages))[::-1]
        self._resting: OrderedDict[int, None] = OrderedDict()  # known, held by nobody
        self._holders = [0] * pages
        self._by_text: dict[_Key, int] = {}
        self._text: dict[int, _Key] = {}
        self._serial: dict[int, int] = {}  # of known pages; never given twice
        self._next_serial = START + 1

    @property
    def free(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._blank) + len(self._resting)

    @property
    def used(self) -> int:
        """Pages that are held."""
        return self.pages - self.free

    def take(self) -> int:
        """Hand out a page; a known text may be forgotten for it.

        Raises:
            IndexError: no page is free.
        """
        if self._blank:
            page = self._blank.pop()
        elif self._resting:
            page, _ = self._resting.popitem(last=False)
            del self._by_text[self._text.pop(page)], self._serial[page]
        else:
            raise IndexError("no page is free")
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Hold a known page, besides others."""
        self._holders[page] += 1
        self._resting.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Give back the pages of one text, in its order."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._text:
                self._resting[page] = None
            else:
                self._blank.append(page)

    def find(self, before: int, tokens: tuple[int, ...]) -> int | None:
        """The known page that holds ``tokens``, or None.

        Args:
            before: serial number of the page before it, or `START`.
            tokens: as many as a page has.
        """
        return self._by_text.get((before, tokens))

    def learn(self, page: int, before: int, tokens: tuple[int, ...]) -> int:
        """Make a full page known.

        Args:
            page: held by the caller, not known yet.
            before: serial number of the page before it, or `START`.
            tokens: what was computed into it.

        Returns:
            The page to use from now on: if one is known with this text, the caller now holds that
            one and no longer ``page``.
        """
        known = self.find(before, tokens)
        if known is not None:
            self.hold(known)
            self.release([page])
            return known
        self._by_text[before, tokens] = page
        self._text[page] = (before, tokens)
        self._serial[page] = self._next_serial
        self._next_serial += 1
        return page

    def serial(self, page: int) -> int:
        """The number by which the page after a known one refers to it."""
        return self._serial[page]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Look for a page that is lost, held wrongly, or known without the page before it.

        Args:
            tables: the pages of everyone who holds some.

        Raises:
            RuntimeError: the books are wrong: a bug.
        """
        holders = Counter(page for table in tables for page in table)
        places = [*self._blank, *self._resting, *holders]
        serials = {START, *self._serial.values()}
        for wrong, what in (
            (sorted(places) != list(range(self.pages)), "a page is lost or in two places"),
            ([holders[page] for page in range(self.pages)] != self._holders, "wrong holders"),
            (not self._text.keys() >= self._resting.keys(), "a resting page without a text"),
            (self._text.keys() & {*self._blank}, "a blank page with a text"),
            (self._text != {page: key for key, page in self._by_text.items()}, "two names"),
            ({before for before, _ in self._by_text} - serials, "a text without its beginning"),
        ):
            if wrong:
                raise RuntimeError(f"pages of the KV cache: {what}")
