// SPDX-License-Identifier: Apache-2.0
#include "order.h"

#include <algorithm>

namespace hetconv::host {

Order::Order(int members) : clocks_(size_t(members), Clock(2 * size_t(members), 0)) {
  // Nobody knows of what was done at the time 1 and later.
  for (int i = 0; i < members; ++i) clocks_[size_t(i)][size_t(i)] = 1;
}

void Order::join(Clock& to, const Clock& from) {
  const size_t count = from.size();
  uint32_t* a = to.data();
  const uint32_t* b = from.data();
  for (size_t i = 0; i < count; ++i) a[i] = a[i] < b[i] ? b[i] : a[i];
}

void Order::fence(int who) {
  Clock& own = of(who);
  const size_t members = own.size() / 2;
  std::copy(own.begin(), own.begin() + members, own.begin() + members);
  tick(who);
}

bool Order::knows(int who, int other, uint32_t when) const {
  return who == other || clocks_[size_t(who)][size_t(other)] >= when;
}

bool Order::fenced(int who, int writer, uint32_t when) const {
  return clocks_[size_t(who)][clocks_.size() + size_t(writer)] >= when;
}

void Order::remember(Cell& cell, int who) {
  const uint32_t now = of(who)[size_t(who)];
  for (Cell::Reader& reader : cell.readers)
    if (reader.who == who) {
      reader.when = now;
      return;
    }
  cell.readers.push_back({who, now});
}

const char* Order::read(Cell& cell, int who, int& other) {
  other = cell.writer;
  if (cell.coming) return "reads %s while a copy is on its way there";
  if (cell.closed) return "reads %s, where a barrier lies";
  if (cell.writer < 0) return "reads %s, which nobody has written";
  if (!knows(who, cell.writer, cell.written)) return "race: reads %s, not ordered after %s";
  remember(cell, who);
  return nullptr;
}

const char* Order::write(Cell& cell, int who, int& other) {
  other = cell.writer;
  if (cell.coming) return "writes %s while a copy is on its way there";
  if (cell.closed) return "writes %s, where a barrier lies";
  if (cell.writer >= 0 && !knows(who, cell.writer, cell.written))
    return "race: writes %s, not ordered after %s";
  for (const Cell::Reader& reader : cell.readers) {
    other = reader.who;
    if (!knows(who, reader.who, reader.when)) return "race: writes %s, not ordered after %s";
  }
  cell.readers.clear();
  cell.writer = who;
  cell.written = of(who)[size_t(who)];
  cell.engine = false;
  return nullptr;
}

const char* Order::read_by(Cell& cell, int engine, int starter, int& other) {
  other = cell.writer;
  if (cell.coming) return "multiplies %s while a copy is on its way there";
  if (cell.closed) return "multiplies %s, where a barrier lies";
  if (cell.writer < 0) return "multiplies %s, which nobody has written";
  if (!knows(starter, cell.writer, cell.written))
    return "race: multiplies %s, not ordered after %s";
  if (!cell.engine && !fenced(starter, cell.writer, cell.written))
    return "multiplies %s without a fence after %s";
  remember(cell, engine);
  return nullptr;
}

const char* Order::copied_by(Cell& cell, int starter, int& other) {
  other = cell.writer;
  if (cell.coming) return "copies to %s twice at a time";
  if (cell.closed) return "copies to %s, where a barrier lies";
  if (cell.writer >= 0) {
    if (!knows(starter, cell.writer, cell.written))
      return "race: copies to %s, not ordered after %s";
    if (!cell.engine && !fenced(starter, cell.writer, cell.written))
      return "copies to %s without a fence after %s";
  }
  for (const Cell::Reader& reader : cell.readers) {
    other = reader.who;
    if (!knows(starter, reader.who, reader.when)) return "race: copies to %s, not ordered after %s";
  }
  cell.coming = true;
  return nullptr;
}

void Order::landed(Cell& cell, int engine, bool bulk) {
  cell.coming = false;
  cell.readers.clear();
  cell.writer = engine;
  cell.written = of(engine)[size_t(engine)];
  cell.engine = bulk;
}

}  // namespace hetconv::host
