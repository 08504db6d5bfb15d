"""A ticket by itself: who gets its events, and in which order."""

from __future__ import annotations

import pytest
from elastic_cache.events import Event, Failed, Started
from elastic_cache.ticket import Ticket

FIRST, SECOND = Started(0.0, 1), Started(0.0, 2)
END = Failed(ValueError("no"))


@pytest.fixture
def listening() -> list[Ticket]:
    """Tickets whose listener the service has been told of."""
    return []


@pytest.fixture
def ticket(listening: list[Ticket]) -> Ticket:
    return Ticket(listening.append)


def test_events_come_in_order_and_once(ticket: Ticket) -> None:
    ticket.put(FIRST)
    events = ticket.events()
    assert next(events) is FIRST
    ticket.put(SECOND)
    ticket.put(END)
    assert [*events] == [SECOND, END]
    assert [*ticket.events()] == []
    with pytest.raises(ValueError, match="no"):
        ticket.result()


def test_a_listener_gets_what_was_and_what_comes(ticket: Ticket, listening: list[Ticket]) -> None:
    heard: list[Event] = []
    ticket.put(FIRST)
    ticket.listen(heard.append)
    assert heard == [] and listening == [ticket]
    ticket.call_listener()
    assert heard == [FIRST]
    ticket.put(SECOND)
    ticket.put(END)
    assert heard == [FIRST, SECOND, END]


def test_the_service_may_forestall_being_told_of_a_listener(
    ticket: Ticket, listening: list[Ticket]
) -> None:
    heard: list[Event] = []
    ticket.put(FIRST)
    ticket.listen(heard.append)
    ticket.put(SECOND)
    assert heard == [FIRST, SECOND]
    listening[0].call_listener()
    assert heard == [FIRST, SECOND]


def test_events_have_one_taker(ticket: Ticket) -> None:
    ticket.listen(lambda event: None)
    with pytest.raises(RuntimeError, match="go to a listener already"):
        ticket.listen(lambda event: None)
    with pytest.raises(RuntimeError, match="go to its listener"):
        ticket.events()
    iterated = Ticket(lambda ticket: None)
    iterated.events()
    with pytest.raises(RuntimeError, match="go to an iterator"):
        iterated.listen(lambda event: None)
