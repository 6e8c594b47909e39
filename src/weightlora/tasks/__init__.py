"""Tasks: their targets, columns and metrics."""

# these register the tasks of this package, in this order
from weightlora.tasks import classification as classification  # isort: skip
from weightlora.tasks import glue as glue  # isort: skip
from weightlora.tasks import question_answering as question_answering  # isort: skip
from weightlora.tasks import generation as generation  # isort: skip
from weightlora.tasks import nlg as nlg  # isort: skip
from weightlora.tasks import gsm8k as gsm8k  # isort: skip
from weightlora.tasks import chat as chat  # isort: skip
from weightlora.tasks.base import Task, get_task, list_tasks, register

__all__ = ["Task", "get_task", "list_tasks", "register"]
