"""Seeded streams of classification tasks made from one data set.

| stream | what differs from task to task |
|---|---|
| ``rotated``, ``rotated_at`` | the angle of the images, in even steps or at irregular times |
| ``permuted`` | the order of the pixels |
| ``brightened`` | brightness and contrast |
| ``split`` | which classes there are |
| ``relabelled`` | which label stands for which class |
| ``repeating``, ``without`` | made of another stream: tasks come again, tasks have no data |

A stream is a function of its arguments alone. Each task has a natural number k; ``order`` says in which order the tasks
come, and changes nothing else: task k holds the same examples wherever it stands.
"""

from ssm_nn.models.image_streams import brightened, permuted, rotated, rotated_at
from ssm_nn.models.label_streams import relabelled, split
from ssm_nn.models.rotations import orthogonal_rotation, rotation
from ssm_nn.models.task_streams import LazyTasks, TaskStream, repeating, without

__all__ = [
    "LazyTasks",
    "TaskStream",
    "brightened",
    "orthogonal_rotation",
    "permuted",
    "relabelled",
    "repeating",
    "rotated",
    "rotated_at",
    "rotation",
    "split",
    "without",
]
