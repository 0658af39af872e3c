"""Jobs in processes that are killed."""

from __future__ import annotations

from forks import forked as forked
from forks import pytest_collection_finish as pytest_collection_finish
