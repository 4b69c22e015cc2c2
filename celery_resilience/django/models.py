"""The table of `once`, as Django makes and clears it."""

from __future__ import annotations

from django.db import models


class OnceKey(models.Model):
    """A key that `once` has claimed in this database."""

    key = models.CharField(primary_key=True, max_length=64)
    namespace = models.CharField(max_length=64)
    name = models.CharField(max_length=255)
    result = models.TextField(null=True)
    created_at = models.FloatField()

    class Meta:
        """The names that `once` itself uses."""

        db_table = "resilience_once"
        indexes = (
            models.Index(
                fields=["namespace", "created_at"], name="resilience_once_age"
            ),
        )

    def __str__(self) -> str:
        return str(self.name)
