"""A small stock-keeping model: items, movements and a report."""

import csv
import datetime
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field


class InventoryError(Exception):
    """Raised when a movement cannot be applied to the stock."""


@dataclass
class Item:
    sku: str
    name: str
    price: float
    quantity: int = 0
    tags: list = field(default_factory=list)

    def value(self):
        return self.price * self.quantity

    def to_dict(self):
        return {
            "sku": self.sku,
            "name": self.name,
            "price": self.price,
            "quantity": self.quantity,
            "tags": list(self.tags),
        }

    @classmethod
    def from_dict(cls, data):
        return cls(
            sku=data["sku"],
            name=data["name"],
            price=float(data["price"]),
            quantity=int(data.get("quantity", 0)),
            tags=list(data.get("tags", [])),
        )


@dataclass
class Movement:
    sku: str
    change: int
    when: datetime.datetime
    note: str = ""


class Inventory:
    def __init__(self, items=None):
        self._items = {}
        self._movements = []
        for item in items or []:
            self.add_item(item)

    def __len__(self):
        return len(self._items)

    def __contains__(self, sku):
        return sku in self._items

    def __iter__(self):
        return iter(self._items.values())

    def add_item(self, item):
        if item.sku in self._items:
            raise InventoryError("item %s exists already" % item.sku)
        self._items[item.sku] = item
        return item

    def get(self, sku, default=None):
        return self._items.get(sku, default)

    def remove_item(self, sku):
        try:
            return self._items.pop(sku)
        except KeyError:
            raise InventoryError("no item with the number %s" % sku)

    def move(self, sku, change, note="", when=None):
        item = self.get(sku)
        if item is None:
            raise InventoryError("no item with the number %s" % sku)
        if item.quantity + change < 0:
            raise InventoryError(
                "cannot take %d of %s, only %d left" % (-change, sku, item.quantity)
            )
        if when is None:
            when = datetime.datetime.now()
        item.quantity += change
        self._movements.append(Movement(sku, change, when, note))
        return item.quantity

    def total_value(self):
        return sum(item.value() for item in self._items.values())

    def by_tag(self):
        result = defaultdict(list)
        for item in self:
            for tag in item.tags:
                result[tag].append(item)
        return dict(result)

    def low_stock(self, threshold=5):
        return [item for item in self if item.quantity < threshold]

    def history(self, sku):
        return [movement for movement in self._movements if movement.sku == sku]

    def save(self, path):
        data = {"items": [item.to_dict() for item in self]}
        temporary = path + ".tmp"
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(data, f, indent=2)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path):
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
        return cls([Item.from_dict(entry) for entry in data["items"]])

    def export_csv(self, path):
        with open(path, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["sku", "name", "price", "quantity"])
            for item in sorted(self, key=lambda item: item.sku):
                writer.writerow([item.sku, item.name, item.price, item.quantity])


def print_report(inventory):
    for item in sorted(inventory, key=lambda item: item.name):
        print("%-12s %-30s %8.2f %5d" % (item.sku, item.name, item.price, item.quantity))
    print("total value: %.2f" % inventory.total_value())


def main():
    inventory = Inventory()
    inventory.add_item(Item("A-1", "bolt", 0.25, 100, ["metal"]))
    inventory.add_item(Item("A-2", "nut", 0.15, 80, ["metal"]))
    inventory.add_item(Item("B-7", "rope", 4.5, 3))
    inventory.move("A-1", -20, note="sold")
    print_report(inventory)
    for item in inventory.low_stock():
        print("order more of", item.name)


if __name__ == "__main__":
    main()
