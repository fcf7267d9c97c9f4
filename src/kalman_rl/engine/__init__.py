"""``kalman-rl train``: settings, tasks, models, run folders. Needs the extra ``app``."""

from kalman_rl.errors import extra

with extra("app", __name__):
    import annotated_types  # noqa: F401  # brought by that extra alone, and cheap
