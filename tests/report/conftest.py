"""What several tests of the page share."""

from collections.abc import Iterator

import pytest

from tests.report.browser import Browser, find_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed here")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
