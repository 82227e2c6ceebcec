"""Files stay small enough to read in one go."""

from statistics import median

from source_tree import modules

MOST_LINES = 450
MOST_LINES_IN_THE_MEDIAN = 160


def test_no_file_is_too_long() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert not {name: number for name, number in lines.items() if number > MOST_LINES}
    assert median(number for number in lines.values() if number > 1) <= MOST_LINES_IN_THE_MEDIAN
