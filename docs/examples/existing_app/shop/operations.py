"""The shop's operations, which jobs run on many items."""

from rlm_tasks import operation


@operation("shop_price", merge=sum)
def price(order: int) -> int:
    """Return the price of one order, in cents."""
    return 100 + order % 7
