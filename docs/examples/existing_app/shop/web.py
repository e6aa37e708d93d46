"""The shop's web process: it sends tasks as before, and submits jobs through the same app."""

from rlm_tasks import Client
from shop.tasks import send_offer, write_receipt

with Client() as client:
    result = client.execute(
        operation="shop_price", items=range(20_000), type="recursive", timeout=60
    )
    print(result.output, "cents in", result.metrics.splits, "splits")

write_receipt.delay(1, result.output / 100)
send_offer.delay("ada")
