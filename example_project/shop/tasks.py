"""The shop's tasks: enrich, charge and ship an order, or apologise for it."""

from __future__ import annotations

from typing import Any

from celery import chain
from django.conf import settings
from django.db import connection, transaction
from django.db.models import Count, Sum

import celery_resilience
from example_project import ledger
from example_project.chaos import Misfortunes
from example_project.ledger import Effect
from example_project.shop import (
    bank,
    csv_lines,
    enrichment,
    labels,
    plain,
    receipts,
    reporting,
)
from example_project.shop.celery import app
from example_project.shop.models import Order, Payment, Shipment

# All that the two runs do not share.
if settings.SHOP_IS_RESILIENT:
    Base, once = celery_resilience.ResilientTask, celery_resilience.once
else:
    Base, once = plain.Task, plain.once

misfortunes = Misfortunes(settings.SHOP_MISFORTUNES)


@app.task(base=Base, bind=True)
def import_orders(self: Any, first: int, last: int) -> dict[str, Any]:
    """Send every order of these lines of the file on its way."""
    lines = settings.SHOP_ORDERS_CSV.read_bytes().splitlines()
    with self.resilience.batch("orders", chunk=20) as batch:
        for line_no in batch.items(range(first, last + 1)):
            with batch.item(line_no):
                misfortunes.deploy(line_no)
                for _ in range(misfortunes.clicks(line_no)):
                    send_order(line_no, lines[line_no - 1])
    report: dict[str, Any] = batch.report
    return report


def send_order(line_no: int, raw: bytes) -> None:
    """Send one order on its way."""
    order = chain(
        enrich.s(line_no, raw).set(task_id=f"line-{line_no}"),
        charge.s(),
        ship.s(),
    )
    order.on_error(apologise.si(line_no)).apply_async(root_id=f"line-{line_no}")


@app.task(
    base=Base,
    time_limit=2,
    autoretry_for=(enrichment.ServiceDown,),
    max_retries=2,
    retry_backoff=1,
    retry_backoff_max=2,
    redact=("raw",),
)
def enrich(line_no: int, raw: bytes) -> int:
    """Accept the order of a line, with its delivery zone."""
    misfortunes.strike("enrich", line_no)
    line = csv_lines.parse(raw, release=settings.SHOP_RELEASE)
    earlier = Order.objects.filter(number=line.number).exclude(pk=line_no).first()
    if earlier is not None:
        raise csv_lines.LineRefused(
            f"the order number {line.number} was taken by line {earlier.line_no}"
        )
    zone = enrichment.zone_of(
        settings.SHOP_SERVICE_URL, line_no=line_no, city=line.city
    )
    _, is_new = Order.objects.get_or_create(
        line_no=line_no,
        defaults={
            "number": line.number,
            "ordered_on": line.ordered_on,
            "customer": line.customer,
            "email": line.email,
            "city": line.city,
            "item": line.item,
            "amount_cents": line.amount_cents,
            "zone": zone,
        },
    )
    if is_new:
        ledger.append(settings.SHOP_LEDGER, Effect.ACCEPTED, line_no)
    return line_no


@app.task(base=Base, bind=True, time_limit=20, idempotency_key="charge:{line_no}")
def charge(self: Any, line_no: int) -> int:
    """Take the money for an order, and book it."""
    misfortunes.strike("charge", line_no)
    order = Order.objects.get(pk=line_no)
    bank.charge(
        settings.SHOP_SERVICE_URL,
        order=line_no,
        cents=order.amount_cents,
        key=self.resilience.key,
    )
    misfortunes.strike("taken", line_no)
    receipts.keep(line_no)
    with transaction.atomic():
        if once(connection, f"payment:{line_no}"):
            Payment.objects.create(order=order, amount_cents=order.amount_cents)
    misfortunes.strike("booked", line_no)
    return line_no


@app.task(base=Base, time_limit=20)
def ship(line_no: int) -> int:
    """Hand the parcel over."""
    misfortunes.strike("ship", line_no)
    order = Order.objects.get(pk=line_no)
    labels.write(line_no, copies=misfortunes.labels(line_no))
    with transaction.atomic():
        _, is_new = Shipment.objects.get_or_create(
            order=order, defaults={"zone": order.zone}
        )
        if is_new:
            ledger.append(
                settings.SHOP_LEDGER, Effect.SHIPPED, line_no, order.amount_cents
            )
    return line_no


@app.task(base=Base)
def apologise(line_no: int) -> None:
    """Mail the customer that the order is late."""
    ledger.append(settings.SHOP_LEDGER, Effect.APOLOGISED, line_no)


@app.task(base=Base)
def report_revenue() -> None:
    """Count the payments anew, by day and delivery zone."""
    paid = (
        Payment.objects.values("order__ordered_on", "order__zone")
        .annotate(orders=Count("pk"), cents=Sum("amount_cents"))
        .order_by("order__ordered_on", "order__zone")
    )
    reporting.replace_revenue(
        settings.SHOP_REPORTS_URL,
        [
            reporting.Revenue(
                ordered_on=row["order__ordered_on"],
                zone=row["order__zone"],
                orders=row["orders"],
                cents=row["cents"],
            )
            for row in paid
        ],
    )
