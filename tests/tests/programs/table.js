// A table in memory that knows what each of its values must be, and changes while it waits for orders.
//
// node table.js MIB STATUS CONTROL: appends `READY`, `CHECK n values=.. wrong=..` and `DONE n values=.. wrong=..` to
// STATUS; orders `check n` and `quit n` come in CONTROL. Ends by itself when CONTROL has been gone for a while.

'use strict';
const fs = require('fs');
const [mib, status, control] = [Number(process.argv[2]), process.argv[3], process.argv[4]];

// Strings and objects on V8's heap, and buffers outside of it.
function value(index, generation) {
  const word = ((Math.imul(index, 2654435761) ^ Math.imul(generation, 40503)) >>> 0).toString(16).padStart(8, '0');
  return { text: (word + generation).repeat(40), bytes: Buffer.alloc(512, word), generation };
}

function right(index) {
  const [found, wanted] = [table.get('key ' + index), value(index, generations[index])];
  return found.text === wanted.text && found.bytes.equals(wanted.bytes) && found.generation === wanted.generation;
}

const say = (line) => fs.appendFileSync(status, line + '\n');
const generations = new Array(mib * 1024).fill(1);
const table = new Map(generations.map((generation, index) => ['key ' + index, value(index, generation)]));
say(`READY values=${table.size}`);

let [done, missing] = [0, 0];
setInterval(() => {
  let orders = '';
  try {
    orders = fs.readFileSync(control, 'utf8');
    missing = 0;
  } catch {
    if (++missing === 500) process.exit(4);
  }
  const [word, number] = orders.trim().split(' ');
  if (Number(number) > done) {
    done = Number(number);
    const wrong = generations.filter((_, index) => !right(index)).length;
    say(`${word === 'quit' ? 'DONE' : 'CHECK'} ${done} values=${table.size} wrong=${wrong}`);
    if (word === 'quit') process.exit(0);
  }
  for (let i = 0; i < 100; i++) {
    const index = Math.floor(Math.random() * generations.length);
    table.set('key ' + index, value(index, ++generations[index]));
  }
}, 10);
