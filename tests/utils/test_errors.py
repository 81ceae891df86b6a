"""What an error says is fit for a terminal, whoever chose its words."""

from __future__ import annotations

import pickle

from prune_viz.utils.errors import LayerError, UserError, one_line


def test_user_errors_are_one_line() -> None:
    for kind in (UserError, LayerError):
        error = kind("first\nsecond\r\n\tthird \x1b[31mred\x07 \u202egpj\u2028end")
        assert str(error) == r"first second third \x1b[31mred\x07 \u202egpj end"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(UserError()) == ""


def test_a_line_stays_as_it_is() -> None:
    line = one_line("a\nb\x00c\\n")
    assert one_line(line) == line == r"a b\x00c\n"
