// The page of ./bpe stats: fills stats.html from the JSON in the page. Stands behind tokens.js in
// one script, so that the page needs no other file.

const data = JSON.parse(document.getElementById('data').textContent);
const vocabularies = data.vocabularies;
const find = id => document.getElementById(id);
const percent = (part, whole) => {
  const share = 100 * part / Math.max(1, whole);
  return share > 0 && share < .05 ? 'below 0.1 %' : `${share.toFixed(1)} %`;
};
const plural = (n, noun) => `${formatNumber(n)} ${noun}${n === 1 ? '' : 's'}`;

function bytesOfHex(hex) {
  const bytes = new Uint8Array(hex.length / 2);
  for (let i = 0; i < bytes.length; i++) bytes[i] = parseInt(hex.slice(2 * i, 2 * i + 2), 16);
  return bytes;
}

// -------------------------------------------------------------------------------------------------
// The text in figures

function showLead() {
  const {name, documents, bytes, characters} = data.text;
  find('lead').textContent =
    `${name}: ${plural(documents, 'document')}, ${plural(characters, 'character')}, ` +
    `${plural(bytes, 'byte')}. To a language model it is a sequence of numbers, ` +
    (vocabularies.length === 1 ? 'one for each token of its vocabulary.'
                               : `one for each token. Here are ${vocabularies.length} vocabularies.`);
  document.title = `Tokens of ${name}`;
}

// Rows [name, ...cells]; the first row is the head.
function table(rows, caption) {
  const element = make('table'), head = make('thead'), body = make('tbody');
  element.setAttribute('aria-label', caption);
  rows.forEach((cells, r) => {
    const row = make('tr');
    cells.forEach((cell, c) => {
      const item = make(r === 0 || c === 0 ? 'th' : 'td', '', cell);
      if (r === 0) item.scope = 'col';
      else if (c === 0) item.scope = 'row';
      row.append(item);
    });
    (r === 0 ? head : body).append(row);
  });
  element.append(head, body);
  return element;
}

// How long the text is: in bytes, in characters, in tokens of each vocabulary.
function showSequenceLengths() {
  const {bytes, characters} = data.text;
  const rows = [['bytes', bytes, true], ['characters', characters, true],
                ...vocabularies.map(v => [`tokens of ${v.name}`, v.tokens, false])];
  for (const [name, n, isReference] of rows) {
    const bar = make('dd', isReference ? 'reference' : '', formatNumber(n));
    bar.style.setProperty('--share', n / Math.max(bytes, ...vocabularies.map(v => v.tokens)));
    find('sequence-lengths').append(make('dt', '', name), bar);
  }
}

function showFigures() {
  const {bytes, characters} = data.text;
  const rows = [['Vocabulary', 'Tokens', 'Bytes a token', 'Characters a token', 'Tokens it has',
                 'of which occur', 'Bits a token', 'Bits a byte']];
  for (const v of vocabularies) {
    rows.push([v.name, formatNumber(v.tokens), (bytes / v.tokens).toFixed(3),
               (characters / v.tokens).toFixed(3), formatNumber(v.size), percent(v.used, v.size),
               v.entropy.toFixed(2), (v.entropy * v.tokens / bytes).toFixed(3)]);
  }
  const note = make('p', 'quiet',
    'Bits: the entropy of the tokens by their frequency alone. A language model does better, ' +
    'because it sees the tokens before.');
  find('figures').append(table(rows, 'Figures of each vocabulary'));
  find('figures').after(note);
}

// -------------------------------------------------------------------------------------------------
// The text in tokens

// The sample of one vocabulary as the token view has it.
function sampleTokens(vocabulary) {
  const tokens = [];
  let offset = 0;
  vocabulary.sample.forEach((document, d) => {
    document.forEach(([id, begin, end], i) => {
      tokens.push({
        id, bytes: bytesOfHex(vocabulary.bytes[id]), begin: offset + begin, end: offset + end,
        special: vocabulary.special.includes(id), newDocument: d > 0 && i === 0,
      });
    });
    offset += data.sample[d].length / 2;
  });
  return tokens;
}

function showViews() {
  const views = [];
  for (const v of vocabularies) {
    const box = make('div'), element = make('div');
    const heading = make('h3', '', v.name);
    const tokens = sampleTokens(v);
    heading.append(make('span', 'quiet', ` ${plural(tokens.length, 'token')} here`));
    element.lang = 'und';
    box.append(heading, element);
    find('views').append(box);
    const view = new TokenView(element, {
      label: `The text in tokens of ${v.name}`,
      describe: token => [['in the text', timesText(v.counts[token.id] ?? 0, v.tokens)]],
      onInspect: token => {
        for (const other of views) {
          if (other !== view) other.highlight(token ? token.begin : 0, token ? token.end : 0);
        }
      },
    });
    view.set(tokens);
    views.push(view);
  }
  const {shown, whole} = data.sampled;
  find('sample-note').textContent = shown < whole
    ? `Shown are the first ${formatNumber(shown)} bytes; all figures are of the whole text.` : '';
  onSwitch('view', value => views.forEach(view => view.showIds(value === 'ids')));
}

const timesText = (count, tokens) =>
  `${formatNumber(count)} ${count === 1 ? 'time' : 'times'}, ${percent(count, tokens)}`;

// Calls choose(value) for the button that is pressed, and marks it.
function onSwitch(id, choose) {
  const buttons = [...find(id).querySelectorAll('button')];
  for (const button of buttons) {
    button.addEventListener('click', () => {
      for (const other of buttons) other.setAttribute('aria-pressed', String(other === button));
      choose(button.value);
    });
  }
}

// -------------------------------------------------------------------------------------------------
// How long tokens are

function svg(tag, attributes, text) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const kLengths = 16;  // the last bar holds all tokens that are longer

// Shares of the lengths 1 to kLengths, and of longer ones.
function sharesOf(lengths) {
  const sum = lengths.reduce((a, b) => a + b, 0);
  const shares = Array(kLengths + 1).fill(0);
  lengths.forEach((n, bytes) => {
    if (bytes > 0) shares[Math.min(bytes, kLengths + 1) - 1] += n / Math.max(1, sum);
  });
  return shares;
}

function lengthChart(vocabulary) {
  const text = sharesOf(vocabulary.lengths.text), all = sharesOf(vocabulary.lengths.vocabulary);
  const left = 34, slot = 26, top = 8, height = 150, width = left + slot * text.length + 4;
  const most = Math.max(.05, Math.ceil(20 * Math.max(...lengthCeiling)) / 20);
  const y = share => top + height * (1 - share / most);
  const chart = svg('svg', {
    class: 'chart', viewBox: `0 0 ${width} ${top + height + 22}`, role: 'img',
    'aria-label': `Lengths of the tokens of ${vocabulary.name}; the table below has the numbers`,
  });
  for (const share of [0, most / 2, most]) {
    chart.append(svg('line', {class: 'axis', x1: left, x2: width, y1: y(share), y2: y(share)}),
                 svg('text', {x: left - 6, y: y(share) + 4, 'text-anchor': 'end'},
                     `${+(100 * share).toFixed(1)}%`));
  }
  let outline = '';
  text.forEach((share, i) => {
    const x = left + slot * i;
    chart.append(svg('rect', {class: 'bar', x: x + 3, width: slot - 6, y: y(share), height: top + height - y(share)}),
                 svg('text', {x: x + slot / 2, y: top + height + 16, 'text-anchor': 'middle'},
                     i < kLengths ? i + 1 : `>${kLengths}`));
    outline += `${i ? 'L' : 'M'}${x} ${y(all[i])}L${x + slot} ${y(all[i])}`;
  });
  chart.append(svg('path', {class: 'outline', d: outline}));
  return chart;
}

// The same scale for all charts.
const lengthCeiling = vocabularies.flatMap(v => [...sharesOf(v.lengths.text), ...sharesOf(v.lengths.vocabulary)]);

function showLengths() {
  for (const v of vocabularies) {
    const box = make('div'), numbers = make('details');
    const text = sharesOf(v.lengths.text), all = sharesOf(v.lengths.vocabulary);
    const rows = text.map((share, i) => [i < kLengths ? String(i + 1) : `more than ${kLengths}`,
                                         percent(share, 1), percent(all[i], 1)]);
    numbers.append(make('summary', '', 'The numbers'),
                   table([['Bytes', 'In the text', 'In the vocabulary'], ...rows], `Lengths of the tokens of ${v.name}`));
    box.append(make('h3', '', v.name), lengthChart(v), numbers);
    find('lengths').append(box);
  }
}

// -------------------------------------------------------------------------------------------------
// What tokens are

function showKinds() {
  const rows = [['Kind']];
  for (const v of vocabularies) rows[0].push(`${v.name}, text`, 'vocabulary');
  vocabularies[0].kinds.forEach(({kind}, k) => {
    const row = [kind];
    for (const v of vocabularies) row.push(percent(v.kinds[k].text, v.tokens), percent(v.kinds[k].vocabulary, v.size));
    rows.push(row);
  });
  find('kinds').append(table(rows, 'Kinds of tokens'));
}

// Ids with a note each.
function tokenList(vocabulary, ids, note) {
  const list = make('ul', 'token-list');
  list.lang = 'und';
  ids.forEach((id, i) => {
    const item = make('li');
    const token = {id, bytes: bytesOfHex(vocabulary.bytes[id]), special: false};
    const element = tokenElement(token, i);
    element.dir = 'auto';
    item.append(element, make('span', 'note', note(id, token)));
    list.append(item);
  });
  return list;
}

function showLists() {
  for (const v of vocabularies) {
    const box = make('div');
    const add = (title, ids, note) => {
      if (ids.length) box.append(make('h4', '', title), tokenList(v, ids, note));
    };
    box.append(make('h3', '', v.name));
    add('Most frequent', v.frequent, id => formatNumber(v.counts[id]));
    add('Longest that occur, white space apart', v.longest, (id, token) => plural(token.bytes.length, 'byte'));
    add(`Parts of characters: ${percent(v.fragments.tokens, v.tokens)} of the text's tokens`,
        v.fragments.frequent, id => formatNumber(v.counts[id]));
    add(`Never occur: ${formatNumber(v.size - v.used)}, for example`, v.unused, id => `id ${id}`);
    find('lists').append(box);
  }
}

// -------------------------------------------------------------------------------------------------

onSwitch('theme', value => {
  if (value) document.documentElement.dataset.theme = value;
  else delete document.documentElement.dataset.theme;
});
showLead();
showSequenceLengths();
showFigures();
showViews();
showLengths();
showKinds();
showLists();
