"""The library for code that runs in an event loop: the same calls in threads, and a cancellation that really ends them.

The bytes are moved by threads anyway (hashing, files and TLS do not become faster by ``await``), so there is one engine.
"""

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar, Unpack

from checkpoint_operator.api.metadata import ArtifactMetadata
from checkpoint_operator.api.protocol import Layout
from checkpoint_operator.storage.backend import OnProgress
from checkpoint_operator.storage.listing import Filters
from checkpoint_operator.storage.manager import URI, StorageManager, get_storage_manager
from checkpoint_operator.storage.source import Selection

THREADS = 16
"""Calls of one manager that run at once; further ones wait for their turn. Each brings the threads of its transfer."""

Outcome = TypeVar("Outcome")


class AsyncStorageManager:
    """The methods of :class:`StorageManager` as coroutines, and ``list`` as an async iterator.

    A cancelled task stops at its next piece of work, and raises ``CancelledError`` only when its thread has ended: nothing
    goes on behind the caller's back, and what was not committed by then is not visible. ``delete`` and ``get_metadata`` are
    not interrupted, they are waited for. ``progress`` is called in a thread: ``loop.call_soon_threadsafe`` leads back.
    """

    def __init__(self, manager: StorageManager | None = None) -> None:
        self._manager = manager or get_storage_manager()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")

    async def upload(
        self,
        source: str | Path,
        uri: URI,
        metadata: ArtifactMetadata | None = None,
        *,
        uid: str | None = None,
        layout: Layout = Layout.PLAIN,
        selection: Selection | None = None,
        force: bool = False,
        progress: OnProgress | None = None,
    ) -> str:
        """See :meth:`StorageManager.upload`."""
        return await self._run(
            lambda cancelled: self._manager.upload(
                source,
                uri,
                metadata,
                uid=uid,
                layout=layout,
                selection=selection,
                force=force,
                progress=progress,
                cancelled=cancelled,
            )
        )

    async def download(self, uri: URI, destination: str | Path, *, progress: OnProgress | None = None) -> ArtifactMetadata:
        """See :meth:`StorageManager.download`."""
        return await self._run(
            lambda cancelled: self._manager.download(uri, destination, progress=progress, cancelled=cancelled)
        )

    async def verify(
        self, uri: URI, *, manifest_digest: str | None = None, progress: OnProgress | None = None
    ) -> ArtifactMetadata:
        """See :meth:`StorageManager.verify`."""
        return await self._run(
            lambda cancelled: self._manager.verify(
                uri, manifest_digest=manifest_digest, progress=progress, cancelled=cancelled
            )
        )

    async def delete(self, uri: URI, *, force: bool = False) -> str:
        """See :meth:`StorageManager.delete`."""
        return await self._run(lambda _: self._manager.delete(uri, force=force))

    async def get_metadata(self, uri: URI) -> ArtifactMetadata:
        """See :meth:`StorageManager.get_metadata`."""
        return await self._run(lambda _: self._manager.get_metadata(uri))

    async def list(
        self, uri: URI, *, prefix: str = "", artifact_type: str | None = None, **filters: Unpack[Filters]
    ) -> AsyncGenerator[ArtifactMetadata, None]:
        """See :meth:`StorageManager.list`. Whoever leaves the loop early closes it: ``contextlib.aclosing``."""
        cancelled = threading.Event()
        found = self._manager.list(uri, prefix=prefix, artifact_type=artifact_type, cancelled=cancelled, **filters)
        try:
            while (artifact := await self._run(lambda _: next(found, None), cancelled)) is not None:
                yield artifact
        finally:
            await self._run(lambda _: found.close())

    async def _run(self, call: Callable[[threading.Event], Outcome], cancelled: threading.Event | None = None) -> Outcome:
        """Run a call in a thread; a cancellation is handed to it, and raised once the thread has ended."""
        cancelled = cancelled or threading.Event()
        future = self._threads.submit(partial(contextvars.copy_context().run, call, cancelled))
        done = asyncio.wrap_future(future)
        try:
            # Cancelling what a thread computes would only make the loop forget it.
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            cancelled.set()
            future.cancel()  # one that still waits for its turn never begins
            while not done.done():
                with suppress(asyncio.CancelledError):  # asked again: the answer is on its way
                    await asyncio.wait([done])
            if not done.cancelled():
                done.exception()  # looked at, or the loop would complain that nobody did
            raise
