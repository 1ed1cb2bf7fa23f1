"""Logging in to the console, on a clock of our own."""

import pytest

from scheduler.console.sessions import LIFETIME_S, Sessions, TooManyAttempts, WrongPassword


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_lasts_until_it_is_old_or_logged_out():
    clock = Clock()
    sessions = Sessions("secret", clock)
    first, second = sessions.log_in("secret"), sessions.log_in("secret")
    assert first != second
    assert first in sessions
    assert "" not in sessions
    assert "other" not in sessions
    sessions.log_out(first)
    assert first not in sessions
    clock.now += LIFETIME_S - 1
    assert second in sessions
    clock.now += 1
    assert second not in sessions


@pytest.mark.parametrize("wrong", ["", "Secret", "secret ", "sécret"])
def test_only_the_password_will_do(wrong):
    with pytest.raises(WrongPassword):
        Sessions("secret", Clock()).log_in(wrong)


def test_after_too_many_wrong_passwords_even_the_right_one_has_to_wait():
    clock = Clock()
    sessions = Sessions("secret", clock)
    old = sessions.log_in("secret")
    for _ in range(5):
        with pytest.raises(WrongPassword):
            sessions.log_in("guess")
    with pytest.raises(TooManyAttempts) as refused:
        sessions.log_in("secret")
    assert old in sessions
    clock.now += refused.value.retry_after_s
    assert sessions.log_in("secret") in sessions


def test_right_passwords_cost_nothing_and_old_sessions_make_room():
    sessions = Sessions("secret", Clock())
    tokens = [sessions.log_in("secret") for _ in range(70)]
    assert tokens[0] not in sessions
    assert tokens[-1] in sessions
