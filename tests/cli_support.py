"""What every test of a command expects of a mistake."""


def assert_one_sentence(result, *parts):
    """Exit code 2, nothing on stdout, and one line on stderr that begins with `error:` and holds `parts`."""
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()  # a progress bar that ends without a terminal leaves an empty line
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in err
