// Small helpers that the pages share.

export const find = (id) => document.getElementById(id);

/** Make an element; text is never read as HTML. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** Fill an element with a button per name, of which one is chosen; `choose` gets a pressed one's name. */
export function radios(id, names, isChosen, choose) {
  find(id).replaceChildren(...names.map((name) => make("button", {
    role: "radio", "aria-checked": String(isChosen(name)), onclick: () => choose(name),
  }, name)));
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
