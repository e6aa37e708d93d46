"""What the shop does with many items at once."""

from rlm_tasks import operation


@operation("shop_price", merge=sum)
def price(order: int) -> int:
    """Return what one order comes to, in cents."""
    return 100 + order % 7
