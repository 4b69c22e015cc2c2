"""Makes orders.csv: `python -m example_project.make_orders`. The same file each time."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterable
from datetime import date, timedelta
from pathlib import Path

from example_project.chaos import AFTERNOON, MORNING, STRUCK
from example_project.shop.csv_lines import COLUMNS

SEED = 20_261_102

#: How many lines have which fault.
FAULTS = {
    "latin_1": 28,
    "german_date": 44,
    "missing": 14,
    "number_taken": 16,
    "absurd_amount": 12,
}

GIVEN = [
    "Amélie",
    "Björn",
    "Chloé",
    "Dörte",
    "Emil",
    "Frieda",
    "Göran",
    "Hélène",
    "Ilse",
    "Jürgen",
    "Käthe",
    "Lars",
]
GIVEN += [
    "Márta",
    "Nils",
    "Olga",
    "Pia",
    "Ruth",
    "Sören",
    "Tilda",
    "Ulf",
    "Vera",
    "Wim",
    "Yara",
    "Zoë",
]
FAMILY = [
    "Åberg",
    "Bauer",
    "Çelik",
    "Dubois",
    "Engström",
    "Fröhlich",
    "García",
    "Hübner",
    "Ivanova",
]
FAMILY += [
    "Jäger",
    "Kowalska",
    "Lefèvre",
    "Müller",
    "Núñez",
    "Özdemir",
    "Peña",
    "Rössler",
    "Söderberg",
]
FAMILY += ["Thiel", "Ünal", "Vogt", "Weiß", "Zając"]
CITIES = (
    "Berlin Bremen Düsseldorf Graz Köln Leipzig Lübeck München Salzburg Zürich Oslo"
)
ITEMS = {
    "Desk lamp, brass": "64.90",
    "Notebook A5, dotted": "7.50",
    "Fountain pen": "38.00",
    "Ink, 50 ml": "11.20",
    "Letter scale": "129.00",
    "Standing desk": "749.00",
    "Paper, 500 sheets": "9.80",
    "Stapler, red": "23.40",
    "Chair mat": "89.95",
    "Filing cabinet": "315.00",
}
ABSURD = ("-19.90", "1e12", "abc", "0.00", "99999.99", "12,50 EUR")


def lines(rng: random.Random) -> list[bytes]:
    """The file's lines, without their ends."""
    rows = {no: _row(rng, no) for no in range(MORNING.start, AFTERNOON.stop)}
    encodings = dict.fromkeys(rows, "utf-8")
    for fault, line_nos in _choose(rng, rows).items():
        for i, no in enumerate(line_nos):
            row = rows[no]
            if fault == "latin_1":
                row["customer"], row["city"] = f"Jürgen Núñez-{no}", "München"
                encodings[no] = "latin-1"
            elif fault == "german_date":
                day = date.fromisoformat(row["ordered_on"])
                row["ordered_on"] = f"{day:%d.%m.%Y}"
            elif fault == "missing":
                row[("customer", "email", "city", "item")[i % 4]] = ""
            elif fault == "number_taken":
                row.update(rows[no - 150])
            else:
                row["amount"] = ABSURD[i % len(ABSURD)]
    header = ",".join(COLUMNS).encode()
    return [header, *(_line(rows[no]).encode(encodings[no]) for no in rows)]


def _row(rng: random.Random, line_no: int) -> dict[str, str]:
    given, family = rng.choice(GIVEN), rng.choice(FAMILY)
    item = rng.choice(list(ITEMS))
    ordered_on = date(2026, 10, 26) + timedelta(days=line_no // 170)
    return {
        "number": f"B-{40_000 + line_no * 7}",
        "ordered_on": ordered_on.isoformat(),
        "customer": f"{given} {family}",
        "email": f"customer{line_no}@shop.example",
        "city": rng.choice(CITIES.split()),
        "item": item,
        "amount": ITEMS[item],
    }


def _choose(rng: random.Random, rows: Iterable[int]) -> dict[str, list[int]]:
    """Lines for each fault; none twice, and none that meets a misfortune."""
    free = [no for no in rows if no not in STRUCK]
    rng.shuffle(free)
    chosen: dict[str, list[int]] = {fault: [] for fault in FAULTS}
    used: set[int] = set()
    for no in free:
        for fault, count in FAULTS.items():
            if len(chosen[fault]) == count:
                continue
            if fault == "number_taken":
                # The line whose number it takes was shipped before it arrives.
                original = no - 150
                if original not in MORNING or original in used | STRUCK:
                    continue
                used.add(original)
            if no not in used:
                chosen[fault].append(no)
                used.add(no)
            break
    return {fault: sorted(line_nos) for fault, line_nos in chosen.items()}


def _line(row: dict[str, str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(row[name] for name in COLUMNS)
    return text.getvalue()


def main() -> None:
    """Write the file beside this one."""
    made = lines(random.Random(SEED))
    Path(__file__).with_name("orders.csv").write_bytes(b"\n".join(made) + b"\n")


if __name__ == "__main__":
    main()
