"""Hostile inputs in processes of their own."""

from __future__ import annotations

from forks import fuzzed as fuzzed
from forks import pytest_collection_finish as pytest_collection_finish
