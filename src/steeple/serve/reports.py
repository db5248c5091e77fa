"""The server's log: text or JSON lines, and now and then a line about the load."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time

from steeple.serve.service import Service
from steeple.serve.stats import line

log = logging.getLogger(__name__)
FACTS = ("request", "status", "seconds", "tenant")


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, logger, message, and what a record carries beside it."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({name: getattr(record, name) for name in FACTS if getattr(record, name, "") != ""})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


async def report(service: Service, every: float) -> None:
    """A line about the load every so many seconds in which something was written. Runs until it is cancelled."""
    tally = service.loop.tally
    while True:
        before, drafts, tokens = copy.deepcopy(tally.speculation), tally.drafts, tally.generation_tokens
        await asyncio.sleep(every)
        if tally.generation_tokens != tokens:
            log.info(line(service, before, drafts, tokens, every))
