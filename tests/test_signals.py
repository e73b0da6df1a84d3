"""Real signals to real processes, and to handlers in this one."""

import signal
from collections.abc import Iterator

import pytest

from okddip.signals import STOP_SIGNALS, is_stopping, raise_if_stopping, stop_on_signals, stops_deferred


@pytest.fixture(autouse=True)
def handlers_of_a_shell() -> Iterator[None]:
    """As a terminal starts a program: background jobs ignore Ctrl-C, and nohup a closed terminal."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    signal.raise_signal(number)  # to this thread, so at once


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
)
def test_a_signal_ends_the_process_with_the_exit_code_of_a_shell(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, stop_on_signals():
        send(number)
    assert end.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert not is_stopping()


def test_a_signal_waits_for_what_must_not_be_left_half_done() -> None:
    done = []

    @stop_on_signals()
    def work() -> None:
        with stops_deferred():
            send(signal.SIGTERM)
            done.append("inside")
        done.append("after")

    with pytest.raises(SystemExit):
        work()
    assert done == ["inside"]


def test_a_signal_is_answered_though_what_it_waited_for_failed() -> None:
    @stop_on_signals()
    def work() -> None:
        with stops_deferred():
            send(signal.SIGTERM)
            raise RuntimeError("the disk is full")

    with pytest.raises(SystemExit):
        work()


def test_an_exception_after_a_signal_is_a_consequence_of_it() -> None:
    @stop_on_signals()
    def work() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            raise RuntimeError("a worker is gone")

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 143


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_was_dropped_is_answered_when_it_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("okddip.signals.SAME_REQUEST_SECONDS", 0.0)

    class Destructor:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    @stop_on_signals()
    def work() -> None:
        Destructor()
        assert is_stopping()
        send(signal.SIGINT)

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 143


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_was_dropped_ends_the_run_at_its_next_batch() -> None:
    class Destructor:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    @stop_on_signals()
    def work() -> None:
        raise_if_stopping()
        Destructor()
        raise_if_stopping()
        pytest.fail("the run went on")

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 143


def test_signals_in_quick_succession_are_one_request() -> None:
    tidied = []

    @stop_on_signals()
    def work() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            send(signal.SIGINT)
            tidied.append(True)

    with pytest.raises(SystemExit) as end:
        work()
    assert tidied
    assert end.value.code == 143


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("end", [SystemExit(144), RuntimeError("timed out too many times")])
def test_a_launcher_decides_how_the_process_ends(end: BaseException) -> None:
    calls: list[int] = []

    def requeue(number: int, frame: object) -> None:
        calls.append(number)
        raise end

    before = signal.signal(signal.SIGUSR2, requeue)
    try:

        @stop_on_signals()
        def work() -> None:
            with stops_deferred():
                send(signal.SIGUSR2)
                assert calls == []
            pytest.fail("the launcher was not asked")

        with pytest.raises(type(end)) as raised:
            work()
        assert raised.value is end
        assert calls == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_launcher_may_pass_over_a_signal() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with stop_on_signals():
            send(signal.SIGTERM)
            assert not is_stopping()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]


def test_within_one_another_the_outer_one_rules() -> None:
    @stop_on_signals()
    def work() -> None:
        with stop_on_signals():
            pass
        send(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 143
