"""What the owner of a served request holds: its events, its end, and the means to cancel it.

Events wait here until somebody takes them: an iterator in the owner's thread, or a listener, which
the service's thread calls.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator

from elastic_cache.events import Event, Failed, Finished


class Ticket:
    """A submitted request, as its owner sees it; `Service.submit` makes it.

    Args:
        on_listen: told that there is a listener now, to whom the events so far are due.

    Attributes:
        is_cancelled: whether it is to end, or would have to if it were not over.
    """

    def __init__(self, on_listen: Callable[[Ticket], None]) -> None:
        self._on_listen = on_listen
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()  # those that nobody has taken yet
        self._end: Finished | Failed | None = None
        self._is_iterated = self._has_listener = False
        self.is_cancelled = False
        self._listener: Callable[[Event], None] | None = None

    def events(self) -> Iterator[Event]:
        """Waits for and gives every event in turn; ends after Finished or Failed."""
        with self._changed:
            if self._has_listener:
                raise RuntimeError("this ticket's events go to its listener: use one of the two")
            self._is_iterated = True
        return self._take_events()

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Calls `listener` with every event so far and to come, from the service's thread; it must
        return at once and not raise. One listener at most; not together with `events`.

        A listener that raises is not called again, and its request is cancelled. Once the service
        is closed its thread is gone: the events are handed out by the caller's then.
        """
        with self._changed:
            if self._has_listener or self._is_iterated:
                taker = "a listener" if self._has_listener else "an iterator (`events`)"
                raise RuntimeError(f"this ticket's events go to {taker} already")
            self._has_listener = True
            self._listener = listener
        self._on_listen(self)

    def cancel(self) -> None:
        """Ends the request before the next step; Finished follows. Harmless when it is over."""
        self.is_cancelled = True

    def result(self) -> Finished:
        """Waits for the end; raises the error of a request that failed."""
        with self._changed:
            while self._end is None:
                self._changed.wait()
        if isinstance(self._end, Failed):
            raise self._end.error
        return self._end

    def put(self, event: Event) -> None:
        """Adds an event; for the service's thread."""
        with self._changed:
            self._events.append(event)
            if isinstance(event, (Finished, Failed)):
                self._end = event
            self._changed.notify_all()
        self.call_listener()

    def call_listener(self) -> None:
        """Hands the listener, if there is one, what is due; for the service.

        No lock is held meanwhile, so that a listener may use tickets and the service.
        """
        while self._listener is not None:
            with self._changed:
                if not self._events:
                    return
                event = self._events.popleft()
            try:
                self._listener(event)
            except Exception:
                self._listener = None
                self.is_cancelled = True
                logging.getLogger(__name__).exception("a listener raised: its request is cancelled")

    def _take_events(self) -> Iterator[Event]:
        while True:
            with self._changed:
                while not self._events and self._end is None:
                    self._changed.wait()
                if not self._events:
                    return
                event = self._events.popleft()
            yield event
