// Sampling settings: number fields with sliders, and a picture of what they do to the next token.

import {app, element, postJson} from './api.js';
import {formatNumber, tokenElement} from './tokens.js';

// What the API calls it, what people call it, the slider's range and step, and what it does. A
// number beyond the slider's range is the API's to accept.
const kFields = [
  ['temperature', 'Temperature', 0, 2, .05,
   'Below 1 likely tokens become likelier, above 1 less likely. 0: always the likeliest.'],
  ['top_k', 'Top k', 0, 200, 1, 'Only the k likeliest tokens may come. 0: all of them.'],
  ['top_p', 'Top p', 0, 1, .01,
   'Only the likeliest tokens may come, as many as have this probability together.'],
  ['min_p', 'Min p', 0, 1, .01,
   'Only tokens may come that have this share of the likeliest one’s probability.'],
  ['repetition_penalty', 'Repetition penalty', .5, 2, .01,
   'Above 1, tokens that the text already has become less likely.'],
  ['max_tokens', 'Longest answer', 0, 1024, 1, 'In tokens. 0: as long as the context allows.'],
];
const kHint = 'Outline: the model’s own probability. Filled: what the settings make of it.';
const kRows = 10;  // tokens in the picture

const rows = {};  // of each field: its element
let panel, opener, picture, hint, seed, lock, stop;
let defaults = {}, values = {};
let context = null;  // what the next token follows
let timer, fetching;

// For the body of one request: {temperature, top_p, top_k, min_p, repetition_penalty, seed}, and
// max_tokens and stop where they are set. Each call draws another seed, unless the seed is locked.
export function sampling() {
  if (!lock.checked || seed.value === '') {
    seed.value = Math.floor(1e6 * Math.random());  // short enough to be passed on
  }
  const {max_tokens, ...body} = {...values, seed: Number(seed.value)};
  if (max_tokens) body.max_tokens = max_tokens;
  const strings = stop.value.split('\n').filter(line => line);
  if (strings.length) body.stop = strings.map(line => line.replaceAll('\\n', '\n'));
  return body;
}

// What the next token follows: {prompt: text or ids} or {messages, ...}; null: nothing yet. Views
// call it whenever their text has changed.
export function showNext(next) {
  context = next;
  drawSoon();
}

// Once, when there is a model. Follows the choice of another one.
export function startSettings(section) {
  panel = section;
  opener = document.getElementById('open-settings');
  opener.addEventListener('click', () => setOpen(panel.hidden));
  panel.addEventListener('keydown', event => event.key === 'Escape' && close());
  const close = () => {
    setOpen(false);
    opener.focus();
  };
  picture = element('div', {class: 'picture'});
  hint = element('p', {class: 'note hint'}, kHint);
  seed = element('input', {type: 'number', id: 'seed', onchange: () => { lock.checked = true; }});
  lock = element('input', {type: 'checkbox'});
  stop = element('textarea', {id: 'stop', rows: 2, spellcheck: 'false'});
  panel.append(
    element('h2', {}, 'The next token',
            element('button', {type: 'button', class: 'plain', 'aria-label': 'Close the settings',
                               onclick: close}, '✕')),
    picture, hint, ...kFields.map(makeField),
    makeRow('Seed', seed, 'The same seed gives the same text. Unless locked, it changes.',
            element('label', {}, lock, ' locked')),
    makeRow('Stop strings', stop, 'The answer ends before them. One on a line; \\n: line break.'),
    element('p', {class: 'tools'},
            element('button', {type: 'button', onclick: resetAll}, 'All defaults')));
  document.addEventListener('model-chosen', useModel);
  useModel();
}

function setOpen(isOpen) {
  panel.hidden = !isOpen;
  opener.setAttribute('aria-expanded', String(isOpen));
  drawSoon();
}

// -------------------------------------------------------------------------------------------------
// Fields

function makeField([name, label, min, max, step, note]) {
  const onchange = event => {
    values[name] = event.target.value === '' ? defaults[name] : Number(event.target.value);
    keepValues();
  };
  const number = element('input', {type: 'number', id: `set-${name}`, step: 'any', onchange});
  const slider = element('input', {type: 'range', min, max, step, 'aria-label': `${label}, slider`,
                                   oninput: onchange});
  rows[name] = makeRow(label, number, note);
  rows[name].append(element('div', {class: 'slider'}, slider));
  return rows[name];
}

// The hint below the picture is about the field that has the attention.
function makeRow(label, input, note, ...before) {
  const row = element('div', {class: 'setting'}, element('label', {for: input.id}, label),
                      ...before, input);
  input.title = note;
  for (const [event, text] of [['focusin', note], ['pointerenter', note],
                               ['focusout', kHint], ['pointerleave', kHint]]) {
    row.addEventListener(event, () => { hint.textContent = text; });
  }
  return row;
}

// The model's defaults, and what was changed for it since the tab was opened.
function useModel() {
  const {params, n_ctx} = app.model.default_generation_settings;
  const start = {...params, repetition_penalty: params.repeat_penalty, max_tokens: 0};
  for (const [name] of kFields) defaults[name] = Number(start[name].toFixed(4));  // it has 32 bits
  rows.max_tokens.querySelector('[type=range]').max = n_ctx;
  values = {...defaults, ...JSON.parse(sessionStorage.getItem(keptAs()) ?? '{}')};
  showValues();
}

const keptAs = () => `sampling of ${app.model.model}`;
function keepValues() {
  const own = Object.entries(values).filter(([name, value]) => value !== defaults[name]);
  sessionStorage.setItem(keptAs(), JSON.stringify(Object.fromEntries(own)));
  showValues();
}

function resetAll() {
  values = {...defaults};
  stop.value = '';
  lock.checked = false;
  keepValues();
}

function showValues() {
  for (const [name, , min, , , note] of kFields) {
    const [number, slider] = rows[name].querySelectorAll('input');
    number.value = slider.value = values[name];
    number.title = `${note} Default: ${defaults[name]}`;
    rows[name].classList.toggle('changed', values[name] !== defaults[name]);
    rows[name].style.setProperty('--default', (defaults[name] - min) / (slider.max - min));
  }
  drawSoon();
}

// -------------------------------------------------------------------------------------------------
// The picture

function drawSoon() {
  clearTimeout(timer);
  if (!panel.hidden) timer = setTimeout(draw, 120);
}

async function draw() {
  fetching?.abort();
  if (!context) return drawNote('Nothing is written yet that a token could follow.');
  fetching = new AbortController();
  const {max_tokens, ...settings} = values;
  const body = {model: app.model.model, ...context, ...settings, top: kRows};
  try {
    drawTokens(await postJson('next_token', body, fetching.signal));
  } catch (error) {
    if (error.name !== 'AbortError') drawNote(error.message);
  }
}

const drawNote = text => picture.replaceChildren(element('p', {class: 'note'}, text));
const percent = p => p > .9995 ? '100 %' : p >= .0005 ? `${(100 * p).toFixed(1)} %`
                                         : p > 0 ? '< 0.1 %' : 'never';

function drawTokens({tokens, rest, kept, entropy, entropy_after}) {
  const shares = tokens.map(token => [Math.exp(token.logprob), token.probability]);
  const widest = Math.max(...shares.flat());
  const table = element('tbody', {}, ...tokens.map((token, i) => {
    const [own, after] = shares[i];
    const bar = element('span', {class: 'bar', role: 'img', 'aria-label': `own: ${percent(own)}`});
    bar.style.setProperty('--own', own / widest);
    bar.style.setProperty('--after', after / widest);
    return element('tr', {}, element('th', {scope: 'row'}, tokenElement(token, i)),
                   element('td', {}, bar), element('td', {}, percent(after)));
  }));
  picture.replaceChildren(
    element('table', {'aria-label': 'The likeliest next tokens'}, table),
    element('p', {class: 'note number'},
            `${formatNumber(kept)} ${kept === 1 ? 'token' : 'tokens'} may come; not shown: ` +
            `${percent(rest)}. Entropy ${entropy.toFixed(2)} → ` +
            `${entropy_after.toFixed(2)} bits.`));
}
