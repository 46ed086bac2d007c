// Write: a sheet on which one writes, and the model goes on.
//
//     typed text --/tokenize--> tokens --ids--> /v1/completions --scores, new tokens--> tokens
//
// The sheet is tokens (scores.js), and behind them a field for what is typed. What stands is kept
// as ids and sent as ids: it is never cut into tokens anew, unless it is taken back into the field.
// Typed tokens get their scores from a prompt that is echoed.

import {app, element, postJson, say, showError, streamEvents} from './api.js';
import {bitsOf, colouringControls, isScored, ScoredTokens} from './scores.js';
import {sampling, showNext} from './settings.js';
import {formatNumber} from './tokens.js';

const kTokens = 128;  // of a continuation, where the settings say nothing else
const kExperiments = {
  'Recite': 'To be, or not to be, that is the',
  'Few-shot': 'Ada has 12 cups. Ada finds 5 more. How many cups does Ada have now?\nSteps: 12 + 5' +
    ' = 17\nAnswer: 17.\nBen has 9 keys. Ben finds 4 more. How many keys does Ben have now?\n',
  'assistant: user:': 'user: Who are you?\nassistant:',
  'New document': '',
};
const kKeys = 'Ctrl+Enter goes on, Tab takes one token, Esc stops, Ctrl+Z undoes. ' +
              'Esc, then Tab leaves the text.';

let tokens, field, buttons, summary;
let weights = '';     // fingerprint of the model whose ids and scores these are
let steps = [];       // to undo: {at, removed, typed}; `removed` stood from `at` on, then `typed`
let running = null;   // the AbortController of a request
let edited = false, leavesByTab = false;  // typed since the last step; Esc was pressed
let isEnded = false;  // by the model

export function start(section) {
  const button = (name, onclick, more) => element('button', {onclick, ...more}, name);
  const box = element('div');
  tokens = new ScoredTokens(box, {
    label: 'The text in tokens', onAlternative: choose, onEdit: index => takeBack(index, 0),
    onLeave: () => type(field.value, 0),
  });
  field = element('textarea', {
    rows: 1, 'aria-label': 'Text', 'aria-describedby': 'write-keys', autocapitalize: 'off',
    spellcheck: 'false', oninput: () => refresh(edited = true),
  });
  const sheet = element('div', {class: 'sheet card'}, box, field);
  sheet.addEventListener('click', event => event.target === sheet && field.focus());
  buttons = {
    goOn: button('Go on', () => goOn(), {class: 'primary'}),
    stop: button('Stop', stop, {class: 'primary'}),
    one: button('One token', () => goOn({max_tokens: 1})),
    undo: button('Undo', undo),
  };
  const chips = Object.entries(kExperiments).map(
    ([name, text]) => button(name, () => running || goOn({}, change(0, text))));
  summary = element('p', {class: 'note number'});
  section.append(
    element('div', {class: 'tools', role: 'group', 'aria-label': 'Experiments'}, ...chips), sheet,
    element('div', {class: 'dock'}, element(
      'div', {class: 'tools'}, ...Object.values(buttons), colouringControls([tokens])),
            summary, element('p', {class: 'note', id: 'write-keys'}, kKeys)));
  section.addEventListener('keydown', onKey);
  window.addEventListener('resize', placeField);
  window.addEventListener('pagehide', save);
  const stored = JSON.parse(localStorage.getItem('write') ?? '{}');
  weights = stored.weights;
  field.value = stored.typed ?? '';
  tokens.set(stored.tokens ?? []);
}

export function show() {
  if (running) return stop();  // then this is called again
  if (weights !== app.model.system_fingerprint) {  // these ids mean something else there
    field.value = textOf(tokens.cut(0)) + field.value;
    weights = app.model.system_fingerprint;
    steps = [];
  }
  refresh();
}

// -------------------------------------------------------------------------------------------------
// Going on

// `fields`: of this request. `step`: what undoing it brings back.
async function goOn(fields = {}, step = newStep(tokens.tokens.length)) {
  if (running) return;
  const {signal} = running = new AbortController();
  const arrived = [], page = document.documentElement;
  let frame = null;
  const draw = () => {  // once for each frame
    frame = null;
    const follows = window.innerHeight + window.scrollY > page.scrollHeight - 40;
    tokens.append(arrived.splice(0));
    placeField();
    if (follows) window.scrollTo(0, page.scrollHeight);
  };
  showError(null);
  refresh(isEnded = false);
  say('Writing');
  try {
    await takeField(signal);
    const prompt = tokens.tokens.map(token => token.id);
    const echo = tokens.tokens.some((token, i) => i > 0 && !isScored(token));
    const room = app.model.default_generation_settings.n_ctx - prompt.length;
    let scored = echo ? 0 : prompt.length;
    for await (const {choices: [choice]} of streamEvents('v1/completions', {
      model: app.model.model, prompt, echo, logprobs: 10, token_details: true,
      max_tokens: Math.max(1, Math.min(kTokens, room)), ...sampling(), ...fields,
    }, signal)) {
      isEnded ||= choice?.finish_reason === 'stop';
      for (const token of choice?.logprobs?.content ?? []) {
        if (scored < prompt.length) tokens.update(scored++, token);
        else arrived.push(token);
      }
      frame ??= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name !== 'AbortError') showError(error);
  }
  draw();
  running = null;
  if (step.removed.length || step.at < tokens.tokens.length) steps.push(step);
  show();
  save();
  say(summary.textContent);
}

function stop() { running?.abort(); }

// What was typed becomes tokens.
async function takeField(signal) {
  const content = field.value, isFirst = !tokens.tokens.length;
  if (!content && !isFirst) return;
  const {tokens: pieces} = await postJson('tokenize', {
    model: app.model.model, content, add_special: isFirst, with_pieces: true, with_places: true,
  }, signal);
  tokens.append(pieces.map(({piece, begin, end, ...token}) => ({
    ...token, logprob: null, typed: true,
    isSeparator: token.special && begin === end,  // the tokenizer put it in front of the text
    bytes: typeof piece === 'string' ? [...new TextEncoder().encode(piece)] : piece,
  })));
  type('');
}

const newStep = at => ({at, removed: tokens.tokens.slice(at), typed: field.value});

// From `at` on stand other tokens, and what is typed. Returns the step that undoes it.
function change(at, typed, others = [], caret = typed.length) {
  const step = newStep(at);
  tokens.cut(at);
  tokens.append(others);
  type(typed, caret);
  refresh(isEnded = false);
  save();
  return step;
}

function undo() {
  stop();
  const step = running ? null : steps.pop();
  if (step) change(step.at, step.typed, step.removed);
}

function choose(index, alternative) {
  if (running) return;
  const {top_logprobs} = tokens.tokens[index];
  goOn({}, change(index, '', [{...alternative, top_logprobs, typed: true}]));
}

// The text from a token on is typed text again, from the beginning of its character.
function takeBack(at, caret, keepsText = true) {
  if (running) return;
  while (at > 0 && (tokens.tokens[at].bytes[0] & 0xC0) === 0x80) at--;
  const text = keepsText ? textOf(tokens.tokens.slice(at)) : '';
  steps.push(change(at, text + field.value, [], Math.min(caret, text.length)));
  refresh();
}

function textOf(list) {
  const bytes = list.flatMap(token => token.isSeparator ? [] : [...token.bytes]);
  return new TextDecoder('utf-8', {ignoreBOM: true}).decode(new Uint8Array(bytes));
}

// -------------------------------------------------------------------------------------------------
// The field and its keys

function type(text, caret = text.length) {
  if (field.value !== text) field.value = text;
  field.focus({preventScroll: true});
  field.setSelectionRange(caret, caret);
  edited = false;
}

function onKey(event) {
  const {key, shiftKey, altKey, target} = event, last = tokens.tokens.at(-1);
  const isCommand = (event.ctrlKey || event.metaKey) && !altKey && !shiftKey;
  const isPlain = !event.ctrlKey && !event.metaKey && !altKey && !shiftKey;
  const isField = target === field && !running, isAtStart = isField && !field.selectionEnd && last;
  const act = action => {
    event.preventDefault();
    action();
  };
  if (key === 'Escape') stop();
  else if (isCommand && key === 'Enter') act(() => goOn());
  else if (isCommand && key === 'z' && isField && edited) {  // the browser's own undo comes first
    const typed = field.value;
    setTimeout(() => field.value === typed && undo());
  } else if (isCommand && key === 'z') act(undo);
  else if (isPlain && key === 'Tab' && isField && !leavesByTab) act(() => goOn({max_tokens: 1}));
  else if (isPlain && ['ArrowLeft', 'ArrowUp'].includes(key) && isAtStart) {
    act(() => tokens.parts.at(-1).focus());
  } else if (isPlain && key === 'Backspace' && isAtStart) {
    if (last.special) event.preventDefault();  // it goes as a whole
    takeBack(tokens.tokens.length - 1, Infinity, !last.special);
  }
  leavesByTab = key === 'Escape' && isField;
}

// The field begins where the tokens end, in the same line.
function placeField() {
  tokens.element.hidden = !tokens.tokens.length;
  const line = tokens.element.lastChild, last = line?.lastElementChild?.previousSibling;
  const isLeftToRight = line && getComputedStyle(line).direction === 'ltr';
  const right = last && isLeftToRight ? [...last.getClientRects()].at(-1).right : 0;
  field.classList.toggle('in-line', Boolean(isLeftToRight));
  field.style.textIndent = `${Math.max(0, right - field.getBoundingClientRect().left)}px`;
  field.style.height = 'auto';
  field.style.height = `${field.scrollHeight}px`;
}

function refresh() {
  const list = tokens.tokens, scored = list.filter(isScored);
  buttons.goOn.hidden = buttons.one.disabled = field.readOnly = Boolean(running);
  buttons.stop.hidden = !running;
  buttons.undo.disabled = !steps.length;
  field.placeholder = list.length ? '' : 'Write the beginning of a text';
  placeField();
  const mean = scored.reduce((sum, token) => sum + token.logprob, 0) / scored.length;
  summary.textContent = [
    list.length ? `${formatNumber(list.length)} tokens.` : '',
    scored.length ? `${bitsOf(mean).toFixed(3)} bits a token (loss ${(-mean).toFixed(4)}).` : '',
    isEnded ? 'The model ended the text.' : ''].join(' ');
  if (field.value) showNext({prompt: textOf(list) + field.value});
  else showNext(list.length ? {prompt: list.map(token => token.id)} : null);
}

// A reload brings the text back with its scores, but not what could be undone. Where there is no
// room for the alternatives of all tokens, they are left out.
function save() {
  const store = list => localStorage.setItem(
    'write', JSON.stringify({weights, typed: field.value, tokens: list}));
  try {
    store(tokens.tokens);
  } catch {
    store(tokens.tokens.map(({top_logprobs, ...token}) => token));
  }
}
