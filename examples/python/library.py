"""A lending library: books, members, loans, and a report of what is overdue."""

import argparse
import datetime
import json
import sys


class LibraryError(Exception):
    """A book cannot be lent or returned."""


class Book:
    def __init__(self, isbn, title, author, copies=1):
        self.isbn = isbn
        self.title = title
        self.author = author
        self.copies = copies

    def __repr__(self):
        return "Book(%r, %r, %r)" % (self.isbn, self.title, self.author)

    def to_dict(self):
        return {
            "isbn": self.isbn,
            "title": self.title,
            "author": self.author,
            "copies": self.copies,
        }


class Loan:
    def __init__(self, isbn, member, due):
        self.isbn = isbn
        self.member = member
        self.due = due

    def __str__(self):

    def overdue(self, today):
        return today > self.due


class Library:
    def __init__(self, days=28):
        self.days = days
        self.books = {}
        self.loans = []

    def add(self, book):
        if book.isbn in self.books:
            self.books[book.isbn].copies += book.copies
        else:
            self.books[book.isbn] = book

    def available(self, isbn):
        lent = sum(1 for loan in self.loans if loan.isbn == isbn)
        return self.books[isbn].copies - lent

    def lend(self, isbn, member, today):
        if isbn not in self.books:
            raise LibraryError("no book with ISBN %s" % isbn)
        if self.available(isbn) <= 0:
            raise LibraryError("all copies of %s are lent" % isbn)
        loan = Loan(isbn, member, today + datetime.timedelta(days=self.days))
        self.loans.append(loan)
        return loan

    def give_back(self, isbn, member):
        for loan in self.loans:
            if loan.isbn == isbn and loan.member == member:
                self.loans.remove(loan)
                return loan
        raise LibraryError("%s has not borrowed %s" % (member, isbn))

    def overdue(self, today):
        return [loan for loan in self.loans if loan.overdue(today)]


def load(path):
    with open(path, encoding="utf-8") as stream:
        data = json.load(stream)
    library = Library(days=data.get("days", 28))
    for entry in data["books"]:
        library.add(Book(**entry))
    for entry in data.get("loans", []):
        due = datetime.date.fromisoformat(entry["due"])
        library.loans.append(Loan(entry["isbn"], entry["member"], due))
    return library


def report(library, today, out=sys.stdout):
    for loan in library.overdue(today):
        book = library.books[loan.isbn]
        days = (today - loan.due).days
        out.write("%s: %s, %d days late\n" % (loan.member, book.title, days))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="the library as JSON")
    parser.add_argument("--today", default=None, help="a date, YYYY-MM-DD")
    args = parser.parse_args(argv)
    today = datetime.date.fromisoformat(args.today) if args.today else datetime.date.today()
    try:
        report(load(args.file), today)
    except (OSError, ValueError, LibraryError) as error:
        sys.stderr.write("library: %s\n" % error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
