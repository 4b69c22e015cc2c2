"""What the shop knows of its orders."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    """An accepted order; its number may be taken once."""

    line_no = models.PositiveIntegerField(primary_key=True)
    number = models.CharField(max_length=20, unique=True)
    ordered_on = models.DateField()
    customer = models.CharField(max_length=100)
    email = models.EmailField()
    city = models.CharField(max_length=50)
    item = models.CharField(max_length=100)
    amount_cents = models.PositiveIntegerField()
    zone = models.CharField(max_length=20)


class Payment(models.Model):
    """A payment for an order, of which the table would take a second one."""

    order = models.ForeignKey(Order, on_delete=models.PROTECT)
    amount_cents = models.PositiveIntegerField()


class Shipment(models.Model):
    """The one parcel of an order."""

    order = models.OneToOneField(Order, on_delete=models.PROTECT)
    zone = models.CharField(max_length=20)
