"""The queue by itself: a state machine with servers that are made up, and a clock that only the test moves."""

import random
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gserve_core.batch import item_queue, pieces, prefixes, retries, waiting
from gserve_core.batch.item_queue import ItemQueue
from gserve_core.batch.pieces import Call, Item, Outcome, Piece, Server
from gserve_core.batch.prefixes import MIN_SIZE
from gserve_core.errors import ItemError, ItemLost, RemoteError, StallTimeout, TransportError
from gserve_core.messages import Failure, Heartbeat, ResponseOutput, Result

STEPS = 100
EXAMPLES = 200
"""Runs of the state machine, of `STEPS` steps each."""
POISON = "poison"
CANCELLED: Outcome = []
"""Stands for the outcome of a cancelled item, which has none."""
RESULTS_SIZE = 600
"""Size of the results that a call may leave untaken, in bytes: one of the smallest."""
USUAL_RESULTS_SIZE = item_queue.RESULTS_SIZE
BACKGROUND = 400
"""Number of waiting items of a call that never ends, while the others are to end."""


class World:
    """A queue with made-up servers. A piece that holds a poisoned item kills its server."""

    def __init__(self, queue: type[ItemQueue] = ItemQueue) -> None:
        self.now = 0.0
        self.wakes: list[float] = []
        self.live: list[Piece] = []
        """The pieces that were started and have neither ended nor been stopped."""
        self.gone: list[Piece] = []
        self.started: dict[Piece, Server] = {}
        """The server to which each piece was sent."""
        self.probed: list[Server] = []
        self.servers: dict[str, Server] = {}
        self.coming: set[str] = set()
        self.names = (f"server-{number}" for number in range(10**6))
        self.outcomes: dict[Call, dict[int, Outcome]] = defaultdict(dict)
        self.sizes: Counter[Call] = Counter()
        self.submitted = 0
        self.deaths = 0
        self.verdicts_take = 0.0
        """Seconds from when a poisoned item breaks all connections of its server until the word of the death."""
        self.accepts = 10**9
        """Size of a request that servers accept, in bytes."""
        self.resumed: list[Call] = []
        self.lazy: set[Call] = set()
        """The calls whose callers take no outcomes for now."""
        self.was_deserted = False
        """Whether no server answered for so long that all items were given up."""
        self.alone: set[tuple[Call, int]] = set()
        """The items that were alone on a server when it died."""
        self.queue = queue(
            start=self._start, stop=self._stop, cancel=self._cancel, probe=self.probed.append,
            wake=lambda when: self.wakes.append(when), clock=lambda: self.now,
        )  # fmt: skip

    def _start(self, piece: Piece) -> None:
        assert piece.unfinished, "an empty piece was sent"
        assert piece.is_narrowing or not any(item.call.is_paused for item in piece.unfinished), "a paused call goes on"
        self.live.append(piece)
        assert piece.server is not None
        self.started[piece] = piece.server

    def _stop(self, piece: Piece) -> None:
        self.live.remove(piece)
        self.gone.append(piece)

    def _cancel(self, piece: Piece, indexes: list[int]) -> None:
        assert piece in self.live
        assert all(piece.items[index] is None for index in indexes)

    # ------------------------------------------------------------------------------------------------------- happenings

    def call(self) -> Call:
        def deliver(outcomes: list[tuple[int, Outcome]]) -> None:
            for index, outcome in outcomes:
                assert index not in self.outcomes[call], f"item {index} ended twice"
                self.outcomes[call][index] = outcome
            if call not in self.lazy:
                self.take(call)

        call = Call(deliver)
        return call

    def take(self, call: Call) -> None:
        """Have a caller take all its outcomes."""
        self.lazy.discard(call)
        call.taken_size = call.made_size
        if call.is_paused:
            self.resumed.append(call)

    def submit(self, call: Call, prompts: list[str], size: int = 1) -> list[Item]:
        first = self.sizes[call]
        items = [Item(call, first + place, prompt, None, None, size) for place, prompt in enumerate(prompts)]
        self.sizes[call] += len(items)
        self.submitted += len(items)
        self.queue.submit(items)
        self.queue.pump()
        return items

    def expect(self) -> None:
        name = next(self.names)
        self.coming.add(name)
        self.queue.expect(name)

    def add(
        self, capacity: int = 4, name: str | None = None, *, is_watched: bool = True, ends_hung: bool = True
    ) -> Server:
        name = name or next(self.names)
        server = self.servers[name] = Server(name, capacity, is_watched, ends_hung=ends_hung)
        self.coming.discard(name)
        self.queue.add(server)
        return server

    def remove(self, server: Server, *, returns: bool, died: bool) -> None:
        self.deaths += died
        if died:
            begun = [piece for piece in server.pieces if piece.is_begun or not piece.is_narrowing]
            at_stake = [item for piece in begun for item in piece.unfinished]
            if len(at_stake) == 1:
                self.alone.add((at_stake[0].call, at_stake[0].index))
        del self.servers[server.key]
        if server in self.probed:
            self.probed.remove(server)
        if returns:
            self.coming.add(server.key)
        self.queue.remove(server.key, "it died", returns=returns, died=died)

    def result(self, piece: Piece, count: int) -> None:
        """Have a server answer some items; it dies of a poisoned one."""
        if any(item.prompt == POISON for item in piece.unfinished):
            self.queue.handle_events(piece, [Heartbeat(len(piece.unfinished))])
            if (server := piece.server) is not None and server.key in self.servers:
                if self.verdicts_take:
                    for one in [one for one in self.live if one.server is server]:
                        self.end(one, TransportError("connection reset"))
                    self.advance(self.verdicts_take)
                self.remove(server, returns=True, died=True)
            return
        indexes = [index for index, item in enumerate(piece.items) if item is not None][:count]
        events: list[Any] = [Heartbeat(len(indexes))]
        for index in indexes:
            item = piece.items[index]
            assert item is not None
            events.append(Result(index, [ResponseOutput(str(item.prompt))]))
        self.queue.handle_events(piece, events)
        self.resume()

    def resume(self) -> None:
        """Tell the queue of the paused calls whose callers have taken something."""
        resumed, self.resumed = self.resumed, []
        for call in resumed:
            self.queue.resume(call)

    def end(self, piece: Piece, error: Exception | None = None) -> None:
        if piece in self.live:
            self.live.remove(piece)
            self.gone.append(piece)
            self.queue.handle_end(piece, error)

    def finish(self, piece: Piece) -> None:
        """Have a server answer a whole piece, unless it refuses it."""
        if piece.size > self.accepts and len(piece.sent) > 1:
            self.end(piece, RemoteError("too large", status=413))
            return
        self.result(piece, len(piece.items))
        self.end(piece)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due, self.wakes = [it for it in self.wakes if it <= self.now], [it for it in self.wakes if it > self.now]
        if due:
            self.queue.pump()

    def settle(self) -> None:
        """Let whatever the queue waits for happen: callers take, servers come back, connections mend, time passes."""
        for call in [*self.lazy]:
            self.take(call)
        self.resume()
        for server in [it for it in self.servers.values() if it in self.probed or it.is_given_up]:
            self.answer_again(server)
        for name in [*self.coming]:
            self.add(name=name)
        self.advance(item_queue.BUSY_SECONDS + item_queue.VERDICT_SECONDS)

    def answer_again(self, server: Server) -> None:
        if server in self.probed:
            self.probed.remove(server)
        self.queue.handle_answer(server)

    def close(self, *, drains: bool) -> None:
        """End all, at once or after what is in flight; check that every call has ended."""
        if drains:
            self.queue.drain("the end")
            while self.live:
                self.finish(self.live[0])
        self.queue.close("the end")
        self.submit(self.call(), ["late"])
        self.check()
        assert self.queue.ended_items == self.submitted
        assert all(len(self.outcomes[call]) == size for call, size in self.sizes.items() if not call.is_cancelled)

    # --------------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        """Check what holds at every moment."""
        queue = self.queue
        assert queue.submitted == self.submitted
        assert queue.submitted == queue.waiting + queue.in_flight + queue.ended_items, "an item has no place, or two"
        held = [piece for server in queue.servers for piece in server.pieces]
        at_work = [id(item) for piece in held for item in piece.unfinished]
        paused = sum(len(call.waiting) for call in self.sizes if call.is_paused)
        in_turn = sum(len(call.waiting) for call in queue._calls)
        assert queue.waiting == paused + in_turn + sum(map(len, queue._suspects)), "items are counted wrongly"
        assert len(at_work) == len(set(at_work)) == queue.in_flight
        assert not any(item.is_over for piece in held for item in piece.unfinished)
        assert all(item.losses <= self.deaths for piece in held for item in piece.unfinished), "a loss without a death"
        for server in queue.servers:
            if server.is_narrowing:
                assert len([piece for piece in server.pieces if piece.unfinished]) <= 1, "a suspect is not alone"
            else:
                assert server.in_flight <= server.window
        for piece in self.live:
            assert piece.size <= pieces.MAX_PIECE_SIZE or len(piece.sent) == 1 or piece.is_narrowing
        if queue.waiting > paused and not any(when <= self.now for when in self.wakes):
            usable = [it for it in queue.servers if it.is_usable(self.now) and it.settled_at <= self.now]
            idle = [it.key for it in usable if not it.in_flight and not it.pieces]
            assert not idle, f"{idle} idle beside waiting items"

    def note_desertion(self) -> None:
        """Note whether items may be lost because nobody can say what has become of the servers."""
        unseen = all(it.is_given_up for it in self.servers.values())
        self.was_deserted = self.was_deserted or (unseen and not self.coming)

    def check_losses(self) -> None:
        """Check that nothing is lost but what was alone at a death, once all calls have ended."""
        for call, outcomes in self.outcomes.items():
            for index, outcome in outcomes.items():
                was_deserted = self.was_deserted and "no server is available" in str(outcome)
                is_right = was_deserted or (call, index) in self.alone or not isinstance(outcome, ItemLost)
                assert is_right, f"item {index}: {outcome}"
        assert all(len(self.outcomes[call]) == size for call, size in self.sizes.items() if not call.is_cancelled)

    def rounds(self) -> int:
        """Let servers finish all that they have, again and again; return how often."""
        count = 0
        while self.queue.waiting + self.queue.in_flight:
            for piece in [*self.live]:
                self.finish(piece)
            self.settle()
            self.check()
            count += 1
        return count

    def check_speed(self) -> None:
        """Check what holds of every queue, whatever it went through, once its servers are well."""
        self.accepts = 2
        self.submit(self.call(), ["a"] * 64)
        self.rounds()
        self.accepts = 10**9
        for _ in range(100):
            self.submit(self.call(), ["a"] * len(self.servers))
            self.rounds()
        assert min(it.piece_size for it in self.servers.values()) > 1000, "a lowered limit does not recover"

        large, small = self.call(), self.call()
        self.submit(large, ["a"] * 3000)
        self.submit(small, ["b"])
        for _ in range(4):
            for piece in [*self.live]:
                self.finish(piece)
        assert self.outcomes[small], "a small call waits for a large one"
        self.queue.cancel(large)

        (only, *others) = self.servers.values()
        for server in others:
            self.remove(server, returns=False, died=False)
        self.submit(self.call(), ["a"] * only.window)
        for _ in range(2):
            self.remove(only, returns=True, died=True)
            only = self.add(only.window // 2, only.key)
        assert self.rounds() <= 2, "two deaths make the rest serial"

    def drain(self, most: int | None = None) -> int:
        """Let all calls end while another one keeps the servers busy; return how many pieces that took.

        However much the others ask, an item has its turn: `most` bounds the pieces.
        """
        self.settle()
        if not self.servers:
            self.add()
        background = self.call()
        pieces = turns = 0
        others = [call for call in self.sizes if not call.is_cancelled]
        while any(len(self.outcomes[call]) < self.sizes[call] for call in others):
            if (short := BACKGROUND - len(background.waiting)) > BACKGROUND // 2:
                self.submit(background, ["more"] * short)
            for piece in [*self.live]:
                self.finish(piece)
                pieces += 1
            self.settle()
            self.check()
            turns += 1
            waiting = {self.sizes[call] - len(self.outcomes[call]) for call in others}
            assert most is None or max(pieces, turns) <= most, f"{sum(waiting)} items starve, after {pieces} pieces"
        self.queue.cancel(background)
        return pieces


DOCUMENTS = ["", *(f"{number} " * 1000 for number in range(4))]
"""The first is no document: prompts without one have no prefix."""
PROMPTS = st.lists(st.sampled_from(["a"] * 30 + [POISON]), min_size=1, max_size=40)
CHOICE = st.integers(0, 10**6)


class QueueMachine(RuleBasedStateMachine):
    """Everything that can happen to a queue, in any order."""

    kind: type[ItemQueue] = ItemQueue

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        item_queue.RESULTS_SIZE = RESULTS_SIZE
        self.world = World(self.kind)
        self.world.add()
        self.open: list[Call] = []

    def piece(self, choice: int) -> Piece:
        return self.world.live[choice % len(self.world.live)]

    def one_call(self, choice: int) -> Call:
        """Return a call, one that goes on if there is any."""
        going_on = [call for call in self.open if len(self.world.outcomes[call]) < self.world.sizes[call]]
        calls = going_on or self.open
        return calls[choice % len(calls)]

    @rule(prompts=PROMPTS, size=st.sampled_from([1, 1, 100, 3 << 20]))
    def submit(self, prompts: list[str], size: int) -> None:
        self.open.append(self.world.call())
        self.world.submit(self.open[-1], prompts, size)

    @precondition(lambda self: self.open)
    @rule(choice=CHOICE, prompts=PROMPTS)
    def submit_more(self, choice: int, prompts: list[str]) -> None:
        self.world.submit(self.one_call(choice), prompts)

    @rule(choice=CHOICE, documents=st.lists(st.integers(0, 4), min_size=1, max_size=40))
    def submit_documents(self, choice: int, documents: list[int]) -> None:
        if not self.open or choice % 2:
            self.open.append(self.world.call())
        prompts = [f"{DOCUMENTS[document]}question {place}?" for place, document in enumerate(documents)]
        self.world.submit(self.one_call(choice), prompts, MIN_SIZE)

    @precondition(lambda self: self.open)
    @rule(choice=CHOICE)
    def cancel_or_deadline(self, choice: int) -> None:
        call = self.one_call(choice)
        self.open.remove(call)
        self.world.queue.cancel(call)

    @precondition(lambda self: self.open)
    @rule(choice=CHOICE, count=st.integers(1, 40))
    def cancel_some(self, choice: int, count: int) -> None:
        call = self.one_call(choice)
        outcomes = self.world.outcomes[call]
        indexes = [index for index in range(self.world.sizes[call]) if index not in outcomes][:count]
        outcomes.update(dict.fromkeys(indexes, CANCELLED))
        self.world.queue.cancel(call, indexes)

    @precondition(lambda self: self.open)
    @rule(choice=CHOICE)
    def take_nothing(self, choice: int) -> None:
        self.world.lazy.add(self.one_call(choice))

    @precondition(lambda self: self.world.lazy)
    @rule(choice=CHOICE)
    def take_all(self, choice: int) -> None:
        lazy = [call for call in self.open if call in self.world.lazy]
        for call in lazy[choice % max(1, len(lazy)) :]:
            self.world.take(call)
        self.world.resume()

    @precondition(lambda self: len(self.world.servers) < 4)
    @rule(capacity=st.integers(1, 16), ends_hung=st.booleans())
    def add(self, capacity: int, ends_hung: bool) -> None:
        name = next(iter(self.world.coming), None)
        self.world.add(capacity, name, ends_hung=ends_hung)

    @precondition(lambda self: self.world.servers)
    @rule(choice=CHOICE, died=st.booleans(), returns=st.booleans())
    def remove(self, choice: int, died: bool, returns: bool) -> None:
        servers = [*self.world.servers.values()]
        is_last = len(servers) + len(self.world.coming) == 1
        self.world.remove(servers[choice % len(servers)], returns=returns or is_last, died=died)

    # each of these rules is many: hypothesis leaves out some rules altogether in each run

    @precondition(lambda self: self.world.live)
    @rule(choice=CHOICE, what=st.sampled_from(["all", "some", "error", "twice", "late"]), count=st.integers(1, 40))
    def hear(self, choice: int, what: str, count: int) -> None:
        world, piece = self.world, self.piece(choice)
        if what == "all":
            world.finish(piece)
        elif what == "some":
            world.result(piece, count)
        elif what == "error":
            index = next((index for index, item in enumerate(piece.items) if item is not None), 0)
            world.queue.handle_events(piece, [Failure(index, "too long")])
        elif what == "twice":
            ended = [index for index, item in enumerate(piece.items) if item is None]
            again = [Result(index, [ResponseOutput("again")]) for index in ended]
            world.queue.handle_events(piece, [Result(len(piece.items), []), Result(-1, []), *again])
        elif world.gone:
            piece = world.gone[choice % len(world.gone)]
            world.queue.handle_events(piece, [Result(0, [ResponseOutput("late")]), Result(99, [])])
            world.queue.handle_end(piece, TransportError("late"))

    @precondition(lambda self: self.world.live)
    @rule(choice=CHOICE, what=st.sampled_from(["short", "broken", "silent", 413, 429, 503, 500]))
    def end_early(self, choice: int, what: str | int) -> None:
        errors = {"short": None, "broken": TransportError("reset"), "silent": StallTimeout("no heartbeat")}
        refusal = RemoteError("no", status=what, retry_after=None) if isinstance(what, int) else None
        self.world.end(self.piece(choice), refusal or errors[str(what)])
        self.world.note_desertion()

    @precondition(lambda self: self.world.probed)
    @rule(choice=CHOICE, answers=st.sampled_from([True, True, False]))
    def answer_again_or_never(self, choice: int, answers: bool) -> None:
        server = self.world.probed[choice % len(self.world.probed)]
        if answers:
            self.world.answer_again(server)
        else:
            self.world.probed.remove(server)
            server.is_given_up = True  # as `give_up` is about to say
            self.world.note_desertion()
            self.world.queue.give_up(server, "it does not answer")

    @rule(chance=st.integers(0, 15), drains=st.booleans())
    def close_and_begin_anew(self, chance: int, drains: bool) -> None:
        if chance == 5:  # not 0, which hypothesis likes
            self.world.accepts = 10**9
            self.world.close(drains=drains)
            self.begin()

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]), verdicts_take=st.sampled_from([0.0, 3.0]))
    def wait(self, seconds: float, verdicts_take: float) -> None:
        self.world.verdicts_take = verdicts_take
        self.world.advance(seconds)
        if seconds > 1.0:  # what was to come is there by now
            for name in [*self.world.coming]:
                self.world.add(name=name)

    @invariant()
    def every_item_has_one_place(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        waiting = self.world.queue.waiting + self.world.queue.in_flight
        poisoned = sum(item.prompt == POISON for piece in self.world.live for item in piece.unfinished)
        poisoned += sum(item.prompt == POISON for call in self.open for item in call.waiting)
        suspects = self.world.queue.waiting - sum(len(call.waiting) for call in self.open)
        self.world.accepts = 8 << 20
        item_queue.RESULTS_SIZE = USUAL_RESULTS_SIZE
        # each server sends a piece a round; a poisoned item costs a few deaths, of what was in flight each time
        self.world.drain(most=400 + 2 * waiting + 40 * (poisoned + suspects))
        self.world.check_losses()
        self.world.check_speed()
        self.world.close(drains=False)


def run(machine: type[QueueMachine], examples: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_queue, "RESULTS_SIZE", RESULTS_SIZE)  # so that it is as before in the end
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=STEPS, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate], print_blob=False,
            ),
        )  # fmt: skip


def test_whatever_happens_every_item_has_one_place_and_every_call_ends() -> None:
    run(QueueMachine, EXAMPLES)


# ----------------------------------------------------------------------------- the rules of before, which it must find


class ForgetsWhatHasNotBegun(ItemQueue):
    """A server that goes takes along what it has not begun (1.1)."""

    def remove(self, key: str, why: str, *, returns: bool, died: bool) -> None:
        for server in [server for server in self.servers if server.key == key]:
            for piece in [piece for piece in server.pieces if len(piece.unfinished) == len(piece.sent)]:
                piece.items.clear()
                server.in_flight -= len(piece.sent)
        super().remove(key, why, returns=returns, died=died)


class TakesABreakForADeath(ItemQueue):
    """A connection that breaks is a loss (1.2)."""

    def handle_end(self, piece: Piece, error: Exception | None) -> None:
        is_loss = isinstance(error, TransportError) and not isinstance(error, RemoteError)
        for item in piece.unfinished if is_loss else ():
            item.losses += 1
        super().handle_end(piece, error)


class NarrowsOneByOne(ItemQueue):
    """Suspects run one at a time from the first (1.3)."""

    def remove(self, key: str, why: str, *, returns: bool, died: bool) -> None:
        super().remove(key, why, returns=returns, died=died)
        self._suspects = type(self._suspects)([item] for group in self._suspects for item in group)


class ForgetsTheReservation(ItemQueue):
    """The end of any piece ends the reservation of its server (1.4)."""

    def handle_end(self, piece: Piece, error: Exception | None) -> None:
        for other in piece.server.pieces if piece.server is not None else ():
            other.is_narrowing = False
        super().handle_end(piece, error)

    def handle_answer(self, server: Server) -> None:
        for piece in server.pieces:
            piece.is_narrowing = False
        super().handle_answer(server)


class TakesSuspectsBackWithoutAVerdict(ItemQueue):
    """Suspects are given to others while the verdict on their server is open."""

    def _await_verdict(self, piece: Piece, server: Server, error: Exception) -> None:
        piece.is_narrowing, is_narrowing = False, piece.is_narrowing
        super()._await_verdict(piece, server, error)
        piece.is_narrowing = is_narrowing


class SuspectsComeLast(ItemQueue):
    """Suspects wait until no other item does (1.5)."""

    def _start_suspects(self, usable: list[Server]) -> None:
        if not self._waiting_in_calls:
            super()._start_suspects(usable)


class FirstComeFirstServed(ItemQueue):
    """Items are sent in the order in which they came, whoever sent them (1.6)."""

    def _take_items(self, server: Server, count: int, most: float, calls: int | None = None) -> list[Item]:
        call = self._calls[0]
        others = [self._calls.pop() for _ in range(len(self._calls) - 1)]
        taken = super()._take_items(server, count, most, calls)
        self._calls.extend(reversed(others))
        if call.waiting:
            self._calls.remove(call)
            self._calls.appendleft(call)
        return taken


class NeverRecovers(ItemQueue):
    """A limit that a refusal has lowered stays (5.2)."""

    def handle_end(self, piece: Piece, error: Exception | None) -> None:
        server = piece.server
        before = server.piece_size if server is not None else 0
        super().handle_end(piece, error)
        if server is not None:
            server.piece_size = min(before, server.piece_size)


OLD_RULES = [
    NeverRecovers, ForgetsWhatHasNotBegun, TakesABreakForADeath, NarrowsOneByOne, ForgetsTheReservation,
    TakesSuspectsBackWithoutAVerdict, SuspectsComeLast, FirstComeFirstServed,
]  # fmt: skip


@pytest.mark.parametrize("rules", OLD_RULES)
def test_the_state_machine_finds_the_faults_of_the_rules_before(rules: type[ItemQueue]) -> None:
    class Old(QueueMachine):
        kind = rules

    with pytest.raises(AssertionError):
        run(Old, EXAMPLES)


# ------------------------------------------------------------------------------------------------------ by the numbers


def test_two_deaths_without_a_poisoned_item_cost_no_more_than_their_two_rounds() -> None:
    world = World()
    server = world.add(capacity=256)
    call = world.call()
    world.submit(call, ["a"] * 256)
    for _ in range(2):
        world.remove(server, returns=True, died=True)
        server = world.add(256, server.key)
    assert server.is_narrowing
    assert world.rounds() == 1
    assert len(world.outcomes[call]) == 256


@pytest.mark.parametrize(("items", "servers", "most"), [(1, 1, 3), (16, 1, 4), (256, 1, 5), (1000, 4, 5)])
def test_a_poisoned_item_costs_few_deaths_and_only_itself(items: int, servers: int, most: int) -> None:
    world = World()
    for _ in range(servers):
        world.add(capacity=256)
    deaths = 0
    remove = world.remove

    def counted(server: Server, *, returns: bool, died: bool) -> None:
        nonlocal deaths
        deaths += died
        remove(server, returns=returns, died=died)

    world.remove = counted  # type: ignore[method-assign]
    call = world.call()
    world.submit(call, ["a"] * (items // 2) + [POISON] + ["a"] * (items - items // 2 - 1))
    world.rounds()
    assert [index for index, outcome in world.outcomes[call].items() if isinstance(outcome, ItemLost)] == [items // 2]
    assert deaths <= most


def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    world = World()
    world.add(capacity=16)
    large, small = world.call(), world.call()
    world.submit(large, ["a"] * 60_000)
    world.submit(small, ["b"])
    for _ in range(4):
        for piece in [*world.live]:
            world.finish(piece)
    assert len(world.outcomes[small]) == 1


def test_a_limit_that_a_refusal_has_lowered_recovers() -> None:
    world = World()
    world.add(capacity=256)
    world.accepts = 1 << 20
    world.submit(world.call(), ["a"] * 64, size=100_000)
    world.rounds()
    world.accepts = 10**9
    for _ in range(60):
        world.submit(world.call(), ["a"])
        world.rounds()
    before = len(world.gone)
    world.submit(world.call(), ["tiny"] * 256)
    world.rounds()
    assert len(world.gone) - before <= 2


def test_large_items_do_not_fill_the_memory_of_a_server() -> None:
    world = World()
    server = world.add(capacity=256)
    world.submit(world.call(), ["a"] * 500, size=1 << 20)
    assert server.size_in_flight <= item_queue.MAX_SIZE_IN_FLIGHT
    assert all(piece.size <= pieces.MAX_PIECE_SIZE for piece in world.live)
    world.rounds()


def test_an_interface_that_is_down_is_no_loss() -> None:
    world = World()
    servers = [world.add(capacity=16), world.add(capacity=16)]
    call = world.call()
    items = world.submit(call, ["a"] * 64)
    for _ in range(10):
        while world.live:
            world.end(world.live[0], TransportError("unreachable"))
        world.advance(3.0)
        assert not world.live, "nothing is sent to a server that does not answer"
        for server in [*world.probed]:
            world.probed.remove(server)
            world.queue.handle_answer(server)
    world.rounds()
    assert len(world.outcomes[call]) == 64
    assert not any(item.losses for item in items)
    assert [*world.servers.values()] == servers


def test_a_client_that_was_stopped_gives_up_no_server() -> None:
    """Where nobody ends servers that hang: at first, the silence may have been the client's."""
    world = World()
    servers = [world.add(capacity=4, is_watched=False), world.add(capacity=4, is_watched=False)]
    call = world.call()
    world.submit(call, ["a"] * 100)
    world.advance(60.0)
    while world.live:
        world.end(world.live[0], StallTimeout("no heartbeat"))
    assert sorted(it.key for it in world.probed) == [it.key for it in servers]
    world.settle()
    (sent, *_) = servers[0].pieces
    world.result(sent, 1)
    world.end(sent, StallTimeout("no heartbeat"))
    world.rounds()
    assert len(world.outcomes[call]) == 100
    assert not any(isinstance(it, ItemLost) for it in world.outcomes[call].values())


def test_a_server_that_hangs_again_is_given_up_where_nobody_ends_it() -> None:
    world = World()
    world.add(capacity=4, is_watched=False)
    call = world.call()
    world.submit(call, ["a"] * 100)
    for turn in range(2):
        world.advance(60.0)
        while world.live:
            world.end(world.live[0], StallTimeout("no heartbeat"))
        assert bool(world.outcomes[call]) == (turn == 1)
        world.settle()
    assert len(world.outcomes[call]) == 100
    assert not world.probed


def test_the_verdict_that_comes_late_still_counts() -> None:
    """Items that left a server which did not answer count its death, wherever they are by then."""
    world = World()
    hung, other = world.add(capacity=4), world.add(capacity=4)
    items = world.submit(world.call(), ["a"] * 8)
    left = [item for piece in hung.pieces for item in piece.unfinished]
    for piece in [*hung.pieces]:
        world.end(piece, TransportError("no heartbeat"))
    world.advance(item_queue.VERDICT_SECONDS)
    for piece in [*other.pieces]:
        world.finish(piece)
    world.remove(hung, returns=True, died=True)
    assert [item.losses for item in items] == [int(item in left and not item.is_over) for item in items]


def test_a_death_before_the_server_has_begun_suspects_says_nothing_of_them() -> None:
    """Another client may have had the poisoned item there."""
    world = World()
    call = world.call()
    server = world.add()
    (innocent,) = world.submit(call, ["a"])
    for _ in range(8):
        world.remove(server, returns=True, died=True)
        server = world.add(name=server.key)
    assert innocent.losses == retries.MAX_LOSSES
    assert not world.outcomes[call]
    for turn in range(retries.MAX_RETURNS):
        assert bool(world.outcomes[call]) == (turn > retries.MAX_RETURNS - 7), turn
        world.remove(server, returns=True, died=True)
        server = world.add(name=server.key)


def test_no_suspect_is_begun_while_a_server_may_still_work_on_what_it_was_told_to_drop() -> None:
    world = World()
    server = world.add(capacity=4)
    (innocent,) = world.submit(world.call(), ["a"])
    world.remove(server, returns=True, died=True)
    server = world.add(name=server.key)
    world.remove(server, returns=True, died=True)
    world.queue._is_turn_of_calls = True  # as after a piece of suspects
    poisoned = world.call()
    world.submit(poisoned, [POISON])
    world.add(name=server.key)
    world.queue.cancel(poisoned)
    assert not any(piece.is_narrowing for piece in world.live)
    world.advance(item_queue.SETTLE_SECONDS)
    assert [piece.unfinished for piece in world.live] == [[innocent]]


def paused(monkeypatch: pytest.MonkeyPatch) -> tuple[World, Call]:
    """Return a world with a call of 100 items that is paused, as its caller takes nothing."""
    monkeypatch.setattr(item_queue, "RESULTS_SIZE", RESULTS_SIZE)
    world = World()
    world.add(capacity=4)
    call = world.call()
    world.lazy.add(call)
    world.submit(call, ["a"] * 100)
    (first, *_) = world.live
    world.finish(first)
    assert call.is_paused
    return world, call


def test_a_call_whose_caller_takes_nothing_waits_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world, call = paused(monkeypatch)
    done, other = len(world.outcomes[call]), world.call()
    world.submit(call, ["a"] * 10)
    world.submit(other, ["b"] * 50)
    while world.live:
        world.finish(world.live[0])
    assert (len(world.outcomes[call]), len(world.outcomes[other])) == (done, 50)
    world.check()
    world.rounds()
    assert len(world.outcomes[call]) == 110


@pytest.mark.parametrize("end", ["closed", "drained", "deserted", "cancelled"])
def test_a_call_whose_caller_takes_nothing_ends_as_any_other(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world, call = paused(monkeypatch)
    if end == "cancelled":
        world.queue.cancel(call)
        assert (world.queue.waiting, world.queue.in_flight) == (0, 0)
        return
    if end == "deserted":
        (server,) = world.servers.values()
        world.remove(server, returns=False, died=False)
    else:
        world.close(drains=end == "drained")
    assert len(world.outcomes[call]) == 100
    assert isinstance(world.outcomes[call][99], ItemLost)


def test_items_are_cancelled_one_by_one_wherever_they_are() -> None:
    world = World()
    world.add(capacity=4)
    call, other = world.call(), world.call()
    world.submit(call, ["a"] * 20)
    world.submit(other, ["b"] * 20)
    in_flight, waiting = world.queue.in_flight, world.queue.waiting
    world.queue.cancel(call, {0, 1, 18, 19})
    assert world.queue.in_flight + world.queue.waiting == in_flight + waiting - 4
    world.rounds()
    assert sorted(world.outcomes[call]) == [*range(2, 18)]
    assert len(world.outcomes[other]) == 20
    world.submit(call, ["a"])
    world.rounds()
    assert 20 in world.outcomes[call], "the call itself goes on"


def test_items_of_a_paused_call_are_cancelled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world, call = paused(monkeypatch)
    done = set(world.outcomes[call])
    world.queue.cancel(call, range(50))
    world.check()
    world.rounds()
    assert set(world.outcomes[call]) == done | {*range(50, 100)}


def test_an_item_that_a_gateway_reports_as_lost_is_lost() -> None:
    world = World()
    world.add(capacity=4)
    call = world.call()
    world.submit(call, ["a", "b"])
    (piece,) = world.live
    world.queue.handle_events(piece, [Failure(0, "it killed servers", False, lost=True), Failure(1, "bad")])
    lost, failed = world.outcomes[call][0], world.outcomes[call][1]
    assert isinstance(lost, ItemLost)
    assert isinstance(failed, ItemError)
    assert not isinstance(failed, ItemLost)
    assert (str(lost), lost.invalid, failed.invalid) == ("it killed servers", False, True)


def test_a_server_that_is_resized_gets_as_many_items_as_it_then_has_room_for() -> None:
    world = World()
    server = world.add(capacity=4)
    world.submit(world.call(), ["a"] * 100)
    assert world.queue.in_flight == 8
    world.queue.resize(server.key, 16)
    assert world.queue.in_flight == 32
    world.queue.resize(server.key, 1)
    while server.in_flight > 2:
        world.finish(world.live[0])
    world.queue.resize("unknown", 4)


def test_what_is_closed_ends_every_call() -> None:
    world = World()
    world.add(capacity=4)
    call = world.call()
    world.submit(call, ["a"] * 100)
    world.queue.close("the service was closed")
    assert len(world.outcomes[call]) == 100
    world.submit(call, ["a"] * 3)
    assert len(world.outcomes[call]) == 103
    world.check()


# ------------------------------------------------------------------------------------------------------ long prefixes


def many_questions(documents: int, questions: int, system: str = "") -> list[str]:
    """Return prompts with the same number of questions to each document, in random order."""
    chance = random.Random(0)
    texts = [system + f"{chance.random()} " * 200 for _ in range(documents)]
    prompts = [f"{text}question {number}?" for text in texts for number in range(questions)]
    chance.shuffle(prompts)
    return prompts


def sent(
    prompts: list[str], *, servers: int = 2, capacity: int = 256, at_once: int = 10**6, is_on: bool = True
) -> tuple[dict[str, set[str]], list[int]]:
    """Send prompts, some at a time. Return by document the servers that had it, and the most in flight on each."""
    world = World()
    world.queue.set_prefix_affinity(is_on)
    made = [world.add(capacity) for _ in range(servers)]
    call = world.call()
    most = [0] * servers
    for start in range(0, len(prompts), at_once):
        world.submit(call, prompts[start : start + at_once], size=MIN_SIZE)
        most = [max(before, it.in_flight) for before, it in zip(most, made, strict=True)]
    world.rounds()
    found: defaultdict[str, set[str]] = defaultdict(set)
    pieces = [piece for piece in world.gone if piece.sent]
    for piece, server in ((piece, world.started[piece]) for piece in pieces):
        for item in piece.sent:
            found[str(item.prompt).partition("question")[0]].add(server.key)
    return found, most


@pytest.mark.parametrize("capacity", [16, 256])
@pytest.mark.parametrize("system", ["", "You answer questions. " * 80], ids=["alone", "after a system message"])
def test_each_document_goes_to_one_server(system: str, capacity: int) -> None:
    prompts = many_questions(64, 16, system)
    found, most = sent(prompts, capacity=capacity)
    _, before = sent(prompts, capacity=capacity, is_on=False)
    assert sum(map(len, found.values())) <= 66, "about one server for each of 64 documents"
    assert most == before, "the servers have as many items in flight as without affinity"


@pytest.mark.parametrize(("servers", "most"), [(2, 90), (8, 200)])
def test_documents_go_to_few_servers_though_their_questions_come_bit_by_bit(servers: int, most: int) -> None:
    found, loads = sent(many_questions(64, 16), servers=servers, capacity=64, at_once=60)
    assert sum(map(len, found.values())) <= most, "by chance it is twice as many or more"
    assert max(loads) - min(loads) <= max(loads) // item_queue.AHEAD_BY_PREFIX + 1


def test_what_all_items_share_is_no_reason_to_choose_a_server() -> None:
    prompts = many_questions(1, 1000)
    found, most = sent(prompts, at_once=60)
    assert [len(servers) for servers in found.values()] == [2]
    assert most == sent(prompts, at_once=60, is_on=False)[1]


def test_a_server_without_work_takes_items_that_another_has_the_prefix_of() -> None:
    world = World()
    one, other = world.add(capacity=4), world.add(capacity=4)
    call = world.call()
    prompts = many_questions(1, 100)
    world.submit(call, prompts[:1], size=MIN_SIZE)
    assert sorted([one.in_flight, other.in_flight]) == [0, 1]
    world.submit(call, prompts[1:], size=MIN_SIZE)
    assert [one.in_flight, other.in_flight] == [8, 8]


def test_another_question_goes_to_the_server_that_has_the_document_if_that_is_not_busier() -> None:
    world = World()
    for _ in range(4):
        world.add(capacity=4)
    documents = [f"{number} " * 1000 for number in range(4)]
    homes: dict[str, str] = {}
    for turn in range(3):
        for document in documents:
            world.submit(world.call(), [f"{document}question {turn}?"], size=MIN_SIZE)
        for piece in [*world.live]:
            document = str(piece.sent[0].prompt).partition("question")[0]
            assert piece.server is not None
            assert homes.setdefault(document, piece.server.key) == piece.server.key
            world.finish(piece)
    assert len({*homes.values()}) == 4


def test_the_documents_of_a_dead_server_go_to_others() -> None:
    world = World()
    one, other = world.add(capacity=4), world.add(capacity=4)
    call = world.call()
    world.submit(call, many_questions(8, 50), size=MIN_SIZE)
    world.remove(one, returns=False, died=True)
    world.check()
    assert other.in_flight == 8
    world.rounds()
    assert len(world.outcomes[call]) == 400


@pytest.mark.parametrize(
    ("room", "order"), [(100, "ABCD AAABBBCCCDDD"), (2, "AB AAABBB CD CCCDDD"), (1, "A AAA B BBB C CCC D DDD")]
)
def test_a_request_begins_with_one_question_of_each_document_if_there_is_room_for_all(
    room: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_SPREAD", room * MIN_SIZE)
    world = World()
    world.add(capacity=16)
    world.expect()
    world.submit(world.call(), [f"{name} " * 1000 for _ in range(4) for name in "ABCD"], size=MIN_SIZE)
    (piece,) = world.live
    assert "".join(str(item.prompt)[0] for item in piece.sent) == order.replace(" ", "")


def test_a_group_has_its_turn_however_many_items_another_of_its_server_has() -> None:
    world = World()
    world.add(capacity=4)
    world.expect()  # of a server alone, prefixes do not matter
    call = world.call()
    hot, *rare = [f"{number} " * 1000 for number in range(4)]
    world.submit(call, [*rare, hot], size=MIN_SIZE)
    for piece in [*world.live]:
        world.finish(piece)
    first = world.sizes[call]
    world.submit(call, [hot] * 100, size=MIN_SIZE)
    world.submit(call, rare, size=MIN_SIZE)
    late = range(first + 100, first + 103)
    turns = 0
    while not world.outcomes[call].keys() >= {*late}:
        world.submit(call, [hot] * 16, size=MIN_SIZE)
        for piece in [*world.live]:
            world.finish(piece)
        turns += 1
        assert turns * 16 < 3 * waiting.MAX_PASSED, "a group starves"
    world.queue.cancel(call)


def test_items_that_return_are_sent_before_those_of_all_groups_that_wait() -> None:
    waits, cache = waiting.Waiting[Any](), prefixes.Cache()
    items = [SimpleNamespace(index=index, size=1, prefix=prefixes.Prefix()) for index in range(100)]
    waits.extend(items)
    sent: list[Any] = []
    waits.take(cache, 10, 1e9, sent)
    cache.is_gone = True
    waits.release(cache)
    for item in reversed(sent):
        waits.appendleft(item)
    again: list[Any] = []
    waits.take(prefixes.Cache(), 20, 1e9, again)
    assert again == items[:20]


def test_an_item_has_its_turn_however_many_suit_the_server_better() -> None:
    world = World()
    world.add(capacity=4)
    world.add(capacity=4)
    call = world.call()
    documents = many_questions(2, 4)
    world.submit(call, documents, size=MIN_SIZE)
    world.submit(call, ["short"])
    place = world.sizes[call] - 1
    turns = 0
    while place not in world.outcomes[call]:
        world.submit(call, documents * 2, size=MIN_SIZE)
        for piece in [*world.live]:
            world.finish(piece)
        turns += 1
        assert turns * 16 < 2 * waiting.MAX_PASSED, "it starves"
    world.queue.cancel(call)
