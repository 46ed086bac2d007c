// The view Tokens: any text as models read it.
//
//     text --POST /tokenize--> ids, bytes and places of its tokens --> a TokenView and figures
//
// Another served model's vocabulary can stand beside: a token that has the attention marks those of
// the other one that hold its bytes.

import {app, element, postJson, showError} from './api.js';
import {formatNumber, TokenView} from './tokens.js';

const kExample = 'A strawberry has three r’s, says a model that reads tokens.\n' +
                 '12345 + 6789 = 19134\n\tfor (int i = 0; i < n; i++)\nnaïve, Привет, 3 ≤ π\n';
const kMarks = '␣ space · ⏎ line break · ⇥ tab · \\xE2 a part of a character';

let text, beside, ids, box, timer, fetching;
let columns = [];  // one for each vocabulary: {model, element, figures, view}

export function start(section) {
  text = element('textarea', {rows: 5, spellcheck: 'false', 'aria-label': 'Text', oninput: () => {
    clearTimeout(timer);
    timer = setTimeout(read, 150);
  }});
  text.value = sessionStorage.getItem('tokens') ?? kExample;
  ids = element('button', {type: 'button', 'aria-pressed': 'false', onclick: () => {
    ids.ariaPressed = String(ids.ariaPressed !== 'true');
    for (const column of columns) column.view.showIds(ids.ariaPressed === 'true');
  }}, 'Ids');
  beside = element('select', {onchange: makeColumns});
  box = element('div', {class: 'columns'});
  section.append(
    element('h2', {}, 'Models see tokens, not letters'), text,
    element('div', {class: 'tools'}, ids,
            element('label', {hidden: app.props.models.length < 2}, 'Beside ', beside),
            element('span', {class: 'note end'}, kMarks)),
    box);
}

export function show() {
  const names = app.props.models.map(({model}) => model).filter(name => name !== app.model.model);
  const chosen = names.includes(beside.value) ? beside.value : '';
  beside.replaceChildren(element('option', {value: ''}, 'nothing'),
                         ...names.map(name => element('option', {value: name}, name)));
  beside.value = chosen;
  makeColumns();
}

function makeColumns() {
  columns = [app.model.model, beside.value].filter(name => name).map(makeColumn);
  box.replaceChildren(...columns.map(column => column.element));
  read();
}

function makeColumn(model) {
  const place = element('div', {lang: 'und'}), figures = element('p', {class: 'note number'});
  const view = new TokenView(place, {
    label: `The text in tokens of ${model}`,
    onInspect: token => {
      for (const other of columns) {
        if (other.view !== view) other.view.highlight(token?.begin ?? 0, token?.end ?? 0);
      }
    },
  });
  view.showIds(ids.ariaPressed === 'true');
  const column = element('div', {}, element('h3', {}, model), figures, place);
  return {model, view, figures, element: column};
}

async function read() {
  sessionStorage.setItem('tokens', text.value);
  fetching?.abort();
  fetching = new AbortController();
  try {
    await Promise.all(columns.map(column => readColumn(column, text.value, fetching.signal)));
    showError(null);
  } catch (error) {
    showError(error);
  }
}

async function readColumn({model, view, figures}, content, signal) {
  const {tokens} = await postJson('tokenize', {
    model, content, with_pieces: true, with_places: true,
  }, signal);
  const encoder = new TextEncoder(), bytes = encoder.encode(content).length, n = tokens.length;
  view.set(tokens.map(({piece, ...token}) => ({
    ...token, bytes: typeof piece === 'string' ? encoder.encode(piece) : piece,
  })));
  const count = (k, noun) => `${formatNumber(k)} ${noun}${k === 1 ? '' : 's'}`;
  figures.textContent = [count(n, 'token'), count(bytes, 'byte'),
                         count([...content].length, 'character'),
                         `${(bytes / Math.max(1, n)).toFixed(2)} bytes a token`].join(' · ');
}
