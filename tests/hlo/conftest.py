"""What the compilers make of programs is read here as users get it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def as_users_have_it(compilers_of_users: None) -> None:
    pass
