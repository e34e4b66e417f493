"""Identifiers with their own types, so that a page is never passed where a request is meant."""

from typing import NewType

RequestId = NewType("RequestId", int)
"""A sequence's identity in one engine: never reused while the engine lives."""

ModelIndex = NewType("ModelIndex", int)
"""A model's place in the engine's registry: 0..models-1, fixed for the engine's life."""

GrantId = NewType("GrantId", int)
"""A grant's submission number: monotonic, so it is also the submission order."""

PageId = NewType("PageId", int)
"""A page's place in the KV pool, whose devices' pages follow one another (core/device_pages.py): its bytes
start at ``page_id * page_bytes``."""

HostPage = NewType("HostPage", int)
"""A page's place in the spill store, in host memory: 0..pages of the store-1, each of ``page_bytes``."""

CopyId = NewType("CopyId", int)
"""The number of a copy between KV pages and host memory, in the order of submission."""

KvDevice = NewType("KvDevice", int)
"""Index into the configured list of KV devices."""

WeightsDevice = NewType("WeightsDevice", int)
"""Index into the configured list of weights devices."""

Nanoseconds = NewType("Nanoseconds", int)
"""A point on, or a span of, the injected clock. Integers, so that simulated time is exact."""

NULL_PAGE = PageId(-1)
"""A page-table entry whose page has been given back (it fell out of a sliding window)."""
