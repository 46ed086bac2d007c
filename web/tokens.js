// The token view: a text as a language model reads it, cut into tokens.
//
//     const view = new TokenView(element, {label: 'The text in tokens'});
//     view.set(tokens);       // or view.append(more) while a text grows
//
// A token is {id, bytes, begin, end, special}. `bytes` is a Uint8Array or an array of numbers,
// [begin, end) the token's place in the text, in bytes, and `special` says that it is no text, as
// <|endoftext|>. A token with `newDocument` is set below a line of its own. Those of a conversation
// have a `source` and a `message` too: what they are from. Then colours tell the sources apart.
//
//     tokens --joinCharacters--> groups --> elements
//
// Most groups are one token. Bytes of one character may belong to several tokens: these are one
// group, which shows each token's bytes and above them the character, once. Nothing that a text
// holds is ever markup: elements get their text by textContent alone.
//
// Mouse: a token under the pointer is described in a popover. Keyboard: Tab enters and leaves the
// view, arrows, Home, End, Ctrl+Home and Ctrl+End move between its tokens, Enter or a click chooses
// a token, Escape closes the popover.
//
// Texts may be long and grow: nothing that stands is drawn again.

export class TokenView {
  // label       what a screen reader calls the view
  // isProse     a text to read: spaces are spaces, and tokens have no tints
  // describe    (token, index) -> rows [name, value] to add to the popover
  // onInspect   (token, index, byKeyboard) when a token is described; (null) when none is
  // onChoose    (token, index) on a click or Enter
  // onLeave     () when an arrow key moves behind the last token
  constructor(element, {label, isProse = false, describe, onInspect, onChoose, onLeave} = {}) {
    this.element = element;
    this.isProse = isProse;
    this.describe = describe ?? (() => []);
    this.onInspect = onInspect ?? (() => {});
    this.onChoose = onChoose ?? (() => {});
    this.onLeave = onLeave ?? (() => {});
    this.showsIds = false;
    element.classList.add(isProse ? 'prose' : 'token-view');
    element.setAttribute('role', 'listbox');
    element.setAttribute('aria-orientation', 'horizontal');
    element.setAttribute('aria-label', label ?? 'Tokens');
    element.addEventListener('keydown', event => this.#onKey(event));
    element.addEventListener('focusin', event => this.#inspect(event.target, true));
    element.addEventListener('focusout', event => {
      this.popover.onFocusOut(event);
      this.onInspect(null);
    });
    // A pointer that moves; not one below which a growing text moves.
    element.addEventListener('pointermove', event => this.#inspect(event.target, false));
    element.addEventListener('pointerleave', () => {
      this.popover.hideSoon();
      this.onInspect(null);
    });
    element.addEventListener('click', event => this.#onClick(event));
    this.set([]);
  }

  set(tokens) {
    this.tokens = [];
    this.parts = [];         // parts[i]: the element of tokens[i]
    this.cutCharacter = [];  // cutCharacter[i]: the character that tokens[i] is a part of, if any
    this.line = null;        // the element that takes the next group
    this.openGroup = null;   // the last group, if it ends inside a character
    this.current = 0;        // the token that Tab reaches
    this.element.replaceChildren();
    this.append(tokens);
  }

  append(tokens) {
    let waiting = tokens;
    if (this.openGroup) {
      waiting = [...this.tokens.splice(this.openGroup.index), ...tokens];
      this.parts.length = this.cutCharacter.length = this.openGroup.index;
      for (const element of this.openGroup.elements) {
        element.nextSibling.remove();  // its <wbr>
        element.remove();
      }
    }
    this.openGroup = null;
    for (const group of joinCharacters(waiting)) this.#appendGroup(group);
    this.#makeCurrent(Math.min(this.current, this.tokens.length - 1));
  }

  // Removes the tokens from `index` on, and returns them.
  cut(index) {
    this.popover.hide();
    const removed = this.tokens.slice(index), box = this.element;
    // The tokens of a character stand together, and a character has no more than four.
    let start = Math.max(0, index - 4);
    const inGroup = i => this.parts[i]?.closest('.split')?.contains(this.parts[i - 1]);
    while (start > 0 && inGroup(start)) start--;
    const again = this.tokens.slice(start, index);
    for (const part of this.parts.slice(start)) {
      const whole = part.closest('.split') ?? part;
      if (whole.nextSibling?.tagName === 'WBR') whole.nextSibling.remove();
      whole.remove();
    }
    while (box.lastChild && !box.lastChild.hasChildNodes()) box.lastChild.remove();
    this.tokens.length = this.parts.length = this.cutCharacter.length = start;
    this.line = this.parts.at(-1)?.closest('.line') ?? null;
    this.openGroup = null;
    this.#endLine(this.tokens.slice(-1));
    this.append(again);
    return removed;
  }

  // Whether ids stand in place of text: what the model gets.
  showIds(showsIds) {
    const tokens = this.tokens, current = this.current;
    this.showsIds = showsIds;
    this.set(tokens);
    this.#makeCurrent(current);
  }

  // Marks the tokens that overlap [begin, end) of the text, and brings them into sight.
  highlight(begin, end) {
    for (const part of this.element.querySelectorAll('.same')) part.classList.remove('same');
    const marked = [];
    for (let i = firstEndingBehind(this.tokens, begin);
         i < this.tokens.length && this.tokens[i].begin < end; i++) {
      if (this.tokens[i].end > begin) marked.push(this.parts[i]);
    }
    for (const part of marked) part.classList.add('same');
    if (marked.length) scrollInside(this.element, marked[0]);
  }

  #appendGroup(group) {
    const index = this.tokens.length;
    if (!this.line || group.tokens[0].newDocument) {
      this.line = this.#newLine(this.line && group.tokens[0].newDocument ? 'line document' : 'line');
    }
    const parts = group.tokens.map((token, i) => this.#tokenElement(token, index + i, group.split));
    const cells = group.split ? cutCharacters(group) : [];
    const elements = group.split && !this.showsIds ? [splitElement(cells, parts)] : parts;
    for (const part of elements) this.line.append(part, make('wbr'));  // a row may end behind it
    this.tokens.push(...group.tokens);
    this.parts.push(...parts);
    group.tokens.forEach((token, i) => {
      this.cutCharacter.push(cells.find(cell => cell.first <= i && i <= cell.last)?.text);
    });
    if (group.isOpen) this.openGroup = {index, elements};
    this.#endLine(group.tokens);
  }

  #endLine(tokens) {
    const breaks = this.showsIds ? 0 : lineBreaks(tokens);
    if (breaks > 0) this.line = this.#newLine(breaks > 1 ? 'line paragraph' : 'line');
  }

  #newLine(className) {
    const line = make('div', className);
    line.setAttribute('role', 'presentation');
    line.dir = 'auto';  // a line of Arabic or Hebrew runs from right to left
    this.element.append(line);
    return line;
  }

  #tokenElement(token, index, split) {
    const part = tokenElement(token, index, {
      asBytes: split, asId: this.showsIds, isProse: this.isProse,
    });
    part.setAttribute('role', 'option');
    part.setAttribute('aria-selected', 'false');
    part.tabIndex = -1;
    part.dataset.index = index;
    this.decorate(part, token);
    return part;
  }
  decorate() {}  // of an element: what a subclass has to add

  // -----------------------------------------------------------------------------------------------
  // One token has the attention: Tab reaches it, and the popover describes it.

  #makeCurrent(index) {
    const before = this.parts[this.current];
    if (before) {
      before.tabIndex = -1;
      before.setAttribute('aria-selected', 'false');
    }
    this.current = Math.max(0, index);
    const part = this.parts[this.current];
    if (!part) return;
    part.tabIndex = 0;
    part.setAttribute('aria-selected', 'true');
  }

  #indexOf(element) {
    const part = element.closest?.('[data-index]');
    return part ? Number(part.dataset.index) : -1;
  }

  #inspect(element, byKeyboard) {
    const index = this.#indexOf(element);
    if (index < 0) return;
    const token = this.tokens[index], part = this.parts[index];
    if (!byKeyboard && this.popover.isAt(part)) return;
    if (byKeyboard) {
      this.#makeCurrent(index);
      const from = token.source ? `, from ${originOf(token)}` : '';
      part.setAttribute('aria-label', `${spoken(token)}, token ${token.id}${from}`);
    }
    this.popover.show(part, ...this.content(token, index));
    this.onInspect(token, index, byKeyboard);
  }

  get popover() { return thePopover ??= new Popover('token-popover'); }

  content(token, index) {  // of the popover
    const heading = make('p', 'popover-token'), list = make('dl');
    heading.dir = 'auto';
    heading.append(...visibleNodes(token.bytes, token.special));
    for (const [name, value] of this.#popoverRows(token, index)) {
      list.append(make('dt', '', name), make('dd', '', value));
    }
    return [heading, list];
  }

  #popoverRows(token, index) {
    const hex = [...token.bytes].map(hexByte).join(' ');
    const rows = [['id', String(token.id)]];
    if (token.special) rows.push(['kind', 'special token']);
    if (token.source) rows.push(['from', originOf(token)]);
    rows.push([token.bytes.length === 1 ? '1 byte' : `${token.bytes.length} bytes`, hex || '—']);
    const cut = this.cutCharacter[index];
    const characters = characterNames(token.bytes);
    if (cut) rows.push(['part of', cut]);
    else if (characters) rows.push(['characters', characters]);
    rows.push(['place', `token ${formatNumber(index + 1)} of ${formatNumber(this.tokens.length)}`]);
    return [...rows, ...this.describe(token, index)];
  }

  #onClick(event) {
    const index = this.#indexOf(event.target);
    if (index < 0) return;
    this.parts[index].focus();
    this.onChoose(this.tokens[index], index);
  }

  #onKey(event) {
    if (event.altKey || event.metaKey) return;
    const index = this.#indexOf(event.target);
    if (index < 0) return;
    if (event.key === 'Escape') return this.popover.hide();
    if (event.ctrlKey && event.key === 'Enter') return;
    if (event.key === 'Enter' || event.key === ' ') {
      event.preventDefault();
      this.popover.show(this.parts[index], ...this.content(this.tokens[index], index));
      return this.onChoose(this.tokens[index], index);
    }
    const next = this.#neighbour(index, event.key, event.ctrlKey);
    if (next === undefined) return;
    event.preventDefault();
    if (next === index && ['ArrowRight', 'ArrowDown'].includes(event.key)) return this.onLeave();
    this.parts[next].focus();
  }

  // The index that a key moves to; undefined: the key moves nowhere.
  #neighbour(index, key, ctrl) {
    const last = this.parts.length - 1;
    const line = this.parts[index].closest('.line');
    const isRightToLeft = getComputedStyle(line).direction === 'rtl';
    const step = isRightToLeft ? -1 : 1;
    const inLine = [...line.querySelectorAll('[data-index]')].map(part => this.#indexOf(part));
    switch (key) {
      case 'ArrowRight': return Math.min(last, Math.max(0, index + step));
      case 'ArrowLeft': return Math.min(last, Math.max(0, index - step));
      case 'ArrowDown': return this.#rowBeside(index, 1);
      case 'ArrowUp': return this.#rowBeside(index, -1);
      case 'Home': return ctrl ? 0 : Math.min(...inLine);
      case 'End': return ctrl ? last : Math.max(...inLine);
    }
  }

  // The token above or below: of the next row that is shown, the one nearest to this one.
  #rowBeside(index, step) {
    const start = boxOf(this.parts[index]), x = (start.left + start.right) / 2;
    let row = null, best = index, distance = Infinity;
    for (let i = index + step; i >= 0 && i < this.parts.length; i += step) {
      const box = boxOf(this.parts[i]);
      if (Math.abs(box.top - start.top) < start.height / 2) continue;
      row ??= box;
      if (Math.abs(box.top - row.top) > row.height / 2) break;
      const d = Math.abs((box.left + box.right) / 2 - x);
      if (d < distance) best = i, distance = d;
    }
    return best;
  }
}

// Where a token's row is. The bytes of a cut character hang below theirs.
function boxOf(part) {
  const first = part.getClientRects()[0], split = part.closest('.split');
  if (!split) return first;
  const {left, right, height} = first;
  return {left, right, height, top: split.getClientRects()[0].top};
}

// -------------------------------------------------------------------------------------------------
// Tokens and characters

// Groups of tokens {tokens, split, isOpen, units}: those that hold bytes of one character are one
// group, whose `split` is true. The last group is open if its last character is not complete.
export function joinCharacters(tokens) {
  const groups = [];
  let group = [], bytes = [];
  const close = isOpen => {
    if (group.length) groups.push(...cutGroup(group, bytes, isOpen));
    group = [], bytes = [];
  };
  for (const token of tokens) {
    if (token.special || token.newDocument) close(false);
    group.push(token);
    bytes.push(...token.bytes);
    if (token.special || !endsInside(bytes)) close(false);
  }
  close(true);
  return groups;
}

// Cuts a run of tokens wherever a token ends where a character does.
function cutGroup(tokens, bytes, isOpen) {
  if (tokens.length === 1) {
    return [{tokens, units: charactersOf(bytes), split: false, isOpen}];
  }
  const units = charactersOf(bytes);
  const borders = new Set([0, ...units.map(unit => unit.end)]);
  const groups = [];
  let begin = 0, offset = 0, groupBegin = 0;
  tokens.forEach((token, i) => {
    offset += token.bytes.length;
    if (i + 1 < tokens.length && !borders.has(offset)) return;
    const part = tokens.slice(begin, i + 1);
    groups.push({
      tokens: part,
      units: units.filter(unit => unit.begin >= groupBegin && unit.end <= offset)
                 .map(unit => ({...unit, begin: unit.begin - groupBegin, end: unit.end - groupBegin})),
      split: part.length > 1,
      isOpen: isOpen && i + 1 === tokens.length,
    });
    begin = i + 1, groupBegin = offset;
  });
  return groups;
}

// The character that bytes[i, ...) begins with: {code, length}. `code` is -1 for a byte that no
// well-formed character holds. `length` is 0 when the bytes end inside a character.
function characterAt(bytes, i) {
  const a = bytes[i];
  if (a < 0x80) return {code: a, length: 1};
  const length = a >= 0xC2 && a <= 0xDF ? 2 : a >= 0xE0 && a <= 0xEF ? 3
               : a >= 0xF0 && a <= 0xF4 ? 4 : 1;
  if (length === 1) return {code: -1, length: 1};
  let code = a & (0xFF >> (length + 1));
  for (let k = 1; k < length; k++) {
    if (i + k >= bytes.length) return {code: -1, length: 0};
    const b = bytes[i + k];
    const low = k > 1 ? 0x80 : a === 0xE0 ? 0xA0 : a === 0xF0 ? 0x90 : 0x80;
    const high = k > 1 ? 0xBF : a === 0xED ? 0x9F : a === 0xF4 ? 0x8F : 0xBF;
    if (b < low || b > high) return {code: -1, length: 1};
    code = code << 6 | (b & 0x3F);
  }
  return {code, length};
}

// [{code, begin, end}]; code -1 is a single byte that is not part of a character.
function charactersOf(bytes) {
  const units = [];
  for (let i = 0; i < bytes.length;) {
    const c = characterAt(bytes, i);
    const length = c.length || 1;
    units.push({code: c.length ? c.code : -1, begin: i, end: i + length});
    i += length;
  }
  return units;
}

function endsInside(bytes) {
  for (let i = Math.max(0, bytes.length - 3); i < bytes.length; i++) {
    if (bytes[i] >= 0xC2 && characterAt(bytes, i).length === 0) return true;
  }
  return false;
}

function lineBreaks(tokens) {
  let breaks = 0;
  for (const token of tokens) {
    if (!token.special) for (const byte of token.bytes) breaks += byte === 10;
  }
  return breaks;
}

// The first token that ends behind `offset`; tokens are in the order of the text.
function firstEndingBehind(tokens, offset) {
  let low = 0, high = tokens.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tokens[middle].end > offset) high = middle; else low = middle + 1;
  }
  return low;
}

// -------------------------------------------------------------------------------------------------
// Elements

// A token alone. asBytes: all bytes that are not ASCII are shown as \xE2, because the character is
// shown elsewhere. asId: the id stands for the text.
export function tokenElement(token, index, {asBytes = false, asId = false, isProse = false} = {}) {
  const element = make('span', isProse ? 'token' : `token tint-${index % 5}`);
  if (token.special) element.classList.add('special');
  if (token.source) element.dataset.source = token.source;
  if (token.beginsStretch) element.dataset.origin = originOf(token);
  if (asId) {
    element.classList.add('id');
    element.textContent = token.id;
  } else {
    element.append(...visibleNodes(token.bytes, token.special || isProse, asBytes));
  }
  return element;
}

// The nodes that show bytes: characters as they are, and marks for all that has no shape.
function visibleNodes(bytes, keepsSpaces, asBytes = false) {
  const nodes = [];
  let plain = '';
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = '';
  };
  for (const {code, begin} of charactersOf(bytes)) {
    const mark = code < 0 || (asBytes && code >= 0x80) ? null : markOf(code, keepsSpaces);
    if (mark === undefined) {
      const c = String.fromCodePoint(code);
      plain += plain === '' && /^\p{M}/u.test(c) ? '\u25CC' + c : c;  // a mark needs a letter
      continue;
    }
    flush();
    nodes.push(make('span', mark === null ? 'byte' : 'mark', mark ?? `\\x${hexByte(bytes[begin])}`));
  }
  flush();
  return nodes;
}

// What stands for a character without a shape of its own; undefined: it shows itself.
function markOf(code, keepsSpaces) {
  if (code === 0x20) return keepsSpaces ? undefined : '\u2423';  // ␣
  if (code === 0x0A) return '\u23CE';                          // ⏎
  if (code === 0x09) return '\u21E5';                          // ⇥
  if (code === 0x0D) return '\\r';
  if (code < 0x20 || code === 0x7F) return `\\x${hexByte(code)}`;
  const isShapeless = /^[\p{Z}\p{C}\p{Default_Ignorable_Code_Point}]$/u;
  if (isShapeless.test(String.fromCodePoint(code))) return codePointName(code);
  return undefined;
}

// The characters of a group that several tokens share: {text, first, last}, for the tokens first to
// last. Characters that share a token stand in one cell.
function cutCharacters(group) {
  let offset = 0;
  const places = group.tokens.map(token => {
    const begin = offset;
    offset += token.bytes.length;
    return {begin, end: offset};
  });
  const cells = [];
  for (const unit of group.units) {
    const first = places.findIndex(place => place.end > unit.begin);
    const last = places.findIndex(place => place.end >= unit.end);
    if (unit.code < 0 || first === last) continue;
    const before = cells.at(-1);
    const text = markOf(unit.code, false) ?? String.fromCodePoint(unit.code);
    if (before && before.last >= first) before.text += text, before.last = last;
    else cells.push({text: /^\p{M}/u.test(text) ? '\u25CC' + text : text, first, last});
  }
  return cells;
}

// The cut characters above, the bytes of their tokens below.
function splitElement(cells, parts) {
  const element = make('span', 'split');
  element.setAttribute('role', 'presentation');
  for (const {text, first, last} of cells) {
    const cell = make('span', 'whole', text);
    cell.setAttribute('aria-hidden', 'true');
    cell.style.gridColumn = `${first + 1} / ${last + 2}`;
    element.append(cell);
  }
  parts.forEach((part, i) => { part.style.gridColumn = String(i + 1); });
  element.append(...parts);
  return element;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Scrolls the box, and nothing around it.
function scrollInside(box, element) {
  const outer = box.getBoundingClientRect(), inner = element.getBoundingClientRect();
  if (inner.top >= outer.top && inner.bottom <= outer.bottom) return;
  box.scrollTop += inner.top - outer.top - outer.height / 3;
}

// -------------------------------------------------------------------------------------------------
// What the tokens of a conversation are from

const kSources = {
  template: 'the chat template', role: 'role', content: 'text', reasoning: 'reasoning',
  tool_call: 'call of a tool', tools: 'declared tools', answer: 'answer, as it was sampled',
  result: 'result of a tool',
};

// "message 2: text". The first message is 1.
function originOf({source, message}) {
  return message === null ? kSources[source] : `message ${message + 1}: ${kSources[source]}`;
}

// Marks the tokens that a stretch of one origin begins with: its name stands in front of them, but
// for the template's own text and for roles.
export function markStretches(tokens) {
  tokens.forEach((token, i) => {
    const isNamed = token.source !== 'template' && token.source !== 'role';
    token.beginsStretch = isNamed && (i === 0 || originOf(tokens[i - 1]) !== originOf(token));
  });
  return tokens;
}

// The key of the colours: an item for each source that these tokens have.
export function sourceKey(tokens) {
  const used = new Set(tokens.map(token => token.source));
  return Object.keys(kSources).filter(source => used.has(source)).map(source => {
    const item = make('li'), name = make('span', 'token', kSources[source]);
    name.dataset.source = source;
    item.append(name);
    return item;
  });
}

// -------------------------------------------------------------------------------------------------
// Names

export const formatNumber = n => n.toLocaleString('en-US');
const hexByte = byte => byte.toString(16).toUpperCase().padStart(2, '0');
const codePointName = code => `U+${code.toString(16).toUpperCase().padStart(4, '0')}`;

// "U+0074 U+0068", with "…" where the token holds only a part of a character.
function characterNames(bytes) {
  if (bytes.length === 0 || bytes.length > 16) return '';
  const units = charactersOf(bytes);
  if (units.every(unit => unit.code < 0)) return 'part of a character';
  return units.map(unit => unit.code < 0 ? '…' : codePointName(unit.code)).join(' ').replace(/…( …)+/g, '…');
}

// A token in words, for a screen reader.
export function spoken(token) {
  const names = {0x20: 'space', 0x0A: 'line break', 0x09: 'tab', 0x0D: 'carriage return'};
  const words = [];
  let plain = '';
  const flush = () => {
    if (plain) words.push(plain);
    plain = '';
  };
  for (const {code, begin} of charactersOf(token.bytes)) {
    const name = code < 0 ? `byte ${hexByte(token.bytes[begin])}` : names[code];
    if (name) flush(), words.push(name);
    else plain += String.fromCodePoint(code);
  }
  flush();
  return words.length > 12 ? `${words.slice(0, 12).join(' ')} and so on` : words.join(' ');
}

// -------------------------------------------------------------------------------------------------
// A box beside an element, that says more about it. While one of its buttons or the element has the
// focus, it stays. In it, arrows move between the buttons, and Escape goes back to the element.

export class Popover {
  constructor(id, {role = 'tooltip', label} = {}) {
    this.element = make('div', 'popover');
    this.element.id = id;
    this.element.setAttribute('role', role);
    if (label) this.element.setAttribute('aria-label', label);
    this.element.hidden = true;
    // A pointer that moves from the token onto the popover leaves it open.
    this.element.addEventListener('pointerenter', () => clearTimeout(this.timer));
    this.element.addEventListener('pointerleave', () => this.hideSoon());
    this.element.addEventListener('focusout', event => this.onFocusOut(event));
    this.element.addEventListener('keydown', event => this.#onKey(event));
    (document.querySelector('main') ?? document.body).append(this.element);
    document.addEventListener('keydown', event => event.key === 'Escape' && this.hide());
    const follow = () => this.#place();
    window.addEventListener('scroll', follow, {capture: true, passive: true});
    window.addEventListener('resize', follow);
  }

  show(anchor, ...content) {
    clearTimeout(this.timer);
    if (this.element.contains(document.activeElement)) return;
    this.anchor?.removeAttribute('aria-describedby');
    this.anchor = anchor;
    this.element.replaceChildren(...content);
    this.element.hidden = false;
    anchor.setAttribute('aria-describedby', this.element.id);
    this.#place();
  }

  hide() {
    clearTimeout(this.timer);
    this.anchor?.removeAttribute('aria-describedby');
    this.element.hidden = true;
  }

  hideSoon() {
    clearTimeout(this.timer);
    if (!this.#has(document.activeElement)) this.timer = setTimeout(() => this.hide(), 150);
  }

  // Whether it is open there; then it stays.
  isAt(anchor) {
    if (this.element.hidden || this.anchor !== anchor) return false;
    clearTimeout(this.timer);
    return true;
  }

  // The focus goes to the button that is the current one, or to the first.
  enter() {
    const buttons = [...this.element.querySelectorAll('button')];
    (buttons.find(button => button.ariaCurrent) ?? buttons[0])?.focus();
  }

  onFocusOut(event) { if (!this.#has(event.relatedTarget)) this.hide(); }

  #has(target) { return target === this.anchor || this.element.contains(target); }

  #onKey(event) {
    const buttons = [...this.element.querySelectorAll('button')];
    const index = buttons.indexOf(document.activeElement);
    if (event.key === 'ArrowDown') buttons[Math.min(index + 1, buttons.length - 1)].focus();
    else if (event.key === 'ArrowUp') buttons[Math.max(index - 1, 0)].focus();
    else if (event.key === 'Escape') this.anchor.focus();
    else return;
    event.preventDefault();
  }

  // Below the element, or above it where there is no room, and inside the window.
  #place() {
    if (this.element.hidden) return;
    const rect = this.anchor.getClientRects()[0] ?? this.anchor.getBoundingClientRect();
    if (rect.bottom < 0 || rect.top > window.innerHeight) return this.hide();  // out of sight
    const width = this.element.offsetWidth, height = this.element.offsetHeight, gap = 6;
    const right = document.documentElement.clientWidth - width - 8;
    const below = rect.bottom + gap;
    const fits = below + height <= window.innerHeight - 8;
    this.element.style.left = `${Math.max(8, Math.min(rect.left, right))}px`;
    this.element.style.top = `${Math.max(8, fits ? below : rect.top - gap - height)}px`;
  }
}

let thePopover;
