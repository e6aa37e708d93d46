"""The shop's own tasks."""

import os
from pathlib import Path

from shop.celery import app

FOLDER = Path(os.environ.get("SHOP_FOLDER", "."))


@app.task
def write_receipt(order: int, total: float) -> None:
    """Write one receipt."""
    (FOLDER / f"receipt-{order}.txt").write_text(f"order {order}: {total:.2f}\n")


@app.task
def send_offer(customer: str) -> None:
    """Send one offer, from the queue `mail`."""
    (FOLDER / f"offer-{customer}.txt").write_text(f"Dear {customer}\n")


@app.task
def count_stock() -> None:
    """Count the goods in stock; beat sends this task every ten minutes."""
