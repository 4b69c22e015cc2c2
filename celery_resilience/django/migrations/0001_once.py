"""The table of `once`."""

from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    """As Django has written it."""

    initial = True
    dependencies: list[tuple[str, str]] = []
    operations = [
        migrations.CreateModel(
            name="OnceKey",
            fields=[
                (
                    "key",
                    models.CharField(max_length=64, primary_key=True, serialize=False),
                ),
                ("namespace", models.CharField(max_length=64)),
                ("name", models.CharField(max_length=255)),
                ("result", models.TextField(null=True)),
                ("created_at", models.FloatField()),
            ],
            options={
                "db_table": "resilience_once",
                "indexes": [
                    models.Index(
                        fields=["namespace", "created_at"],
                        name="resilience_once_age",
                    )
                ],
            },
        ),
    ]
