#!/usr/bin/env python3
"""Reads access logs and prints what a site's owner asks first."""

import argparse
import collections
import gzip
import re
import sys
from datetime import datetime

LINE = re.compile(
    r'(?P<host>\S+) \S+ (?P<user>\S+) \[(?P<time>[^\]]+)\] '
    r'"(?P<method>[A-Z]+) (?P<path>\S+) [^"]*" (?P<status>\d{3}) (?P<size>\d+|-)'
)
TIME_FORMAT = "%d/%b/%Y:%H:%M:%S %z"


class Entry:
    __slots__ = ("host", "user", "time", "method", "path", "status", "size")

    def __init__(self, host, user, time, method, path, status, size):
        self.host = host
        self.user = user
        self.time = time
        self.method = method
        self.path = path
        self.status = status
        self.size = size

    def __repr__(self):
        return "<Entry %s %s %d>" % (self.method, self.path, self.status)

    @property
    def is_error(self):
        return self.status >= 400


def open_log(path):
    if path == "-":
        return sys.stdin
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return open(path, "r", encoding="utf-8", errors="replace")


def parse_line(line):
    match = LINE.match(line)
    if match is None:
        return None
    size = match.group("size")
    return Entry(
        host=match.group("host"),
        user=None if match.group("user") == "-" else match.group("user"),
        time=datetime.strptime(match.group("time"), TIME_FORMAT),
        method=match.group("method"),
        path=match.group("path"),
        status=int(match.group("status")),
        size=0 if size == "-" else int(size),
    )


def read_entries(paths):
    for path in paths:
        with open_log(path) as f:
            for number, line in enumerate(f, 1):
                entry = parse_line(line)
                if entry is None:
                    print("%s:%d: cannot read this line" % (path, number), file=sys.stderr)
                    continue
                yield entry


class Summary:
    def __init__(self):
        self.requests = 0
        self.bytes = 0
        self.errors = 0
        self.paths = collections.Counter()
        self.hosts = collections.Counter()
        self.hours = collections.Counter()
        self.first = None
        self.last = None

    def add(self, entry):
        self.requests += 1
        self.bytes += entry.size
        self.paths[entry.path] += 1
        self.hosts[entry.host] += 1
        self.hours[entry.time.hour] += 1
        if entry.is_error:
            self.errors += 1
        if self.first is None or entry.time < self.first:
            self.first = entry.time
        if self.last is None or entry.time > self.last:
            self.last = entry.time

    def error_rate(self):
        if self.requests == 0:
            return 0.0
        return self.errors / self.requests

    def print(self, out=sys.stdout, top=10):
        out.write("requests: %d\n" % self.requests)
        out.write("bytes:    %d\n" % self.bytes)
        out.write("errors:   %d (%.1f %%)\n" % (self.errors, 100 * self.error_rate()))
        if self.first is not None:
            out.write("from %s to %s\n" % (self.first, self.last))
        out.write("\nmost wanted:\n")
        for path, count in self.paths.most_common(top):
            out.write("%8d %s\n" % (count, path))
        out.write("\nbusiest hours:\n")
        for hour, count in sorted(self.hours.items()):
            out.write("%02d:00 %s\n" % (hour, "#" * (60 * count // self.requests)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=["-"], help="log files, - for standard input")
    parser.add_argument("--top", type=int, default=10, help="how many paths to list")
    parser.add_argument("--errors", action="store_true", help="count errors only")
    args = parser.parse_args(argv)
    summary = Summary()
    for entry in read_entries(args.files):
        if args.errors and not entry.is_error:
            continue
        summary.add(entry)
    summary.print(top=args.top)
    return 0 if summary.requests > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
