"""For all tests: what is run by hand only is never taken for quick."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m "not slow"` takes the place of the default `-m "not campaign"`, so a campaign is slow as well."""
    for item in items:
        if item.get_closest_marker("campaign") is not None:
            item.add_marker(pytest.mark.slow)
