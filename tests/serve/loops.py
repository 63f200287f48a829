"""Event loops that a test runs itself: nothing may stay in them, and clients may go away."""

import asyncio
from collections.abc import Coroutine


async def goes() -> dict[str, str]:
    await asyncio.sleep(0.05)
    return {"type": "http.disconnect"}


def alone(main: Coroutine[None, None, None]) -> None:
    """Run it and see that it leaves no task behind."""

    async def run() -> None:
        await main
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
