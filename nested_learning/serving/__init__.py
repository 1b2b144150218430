"""Serves a checkpoint to many sessions that go on learning."""

from nested_learning.serving.engine import Draw
from nested_learning.serving.engine import Engine
from nested_learning.serving.engine import Job
from nested_learning.serving.engine import Outcome
from nested_learning.serving.engine import Ticket
from nested_learning.serving.entries import Entry
from nested_learning.serving.limits import Limits
from nested_learning.serving.limits import RequestError
from nested_learning.serving.requests import Checkpoint
from nested_learning.serving.requests import Request
from nested_learning.serving.requests import Result
from nested_learning.serving.service import Service
from nested_learning.serving.store import Store
from nested_learning.serving.worker import Worker
