// The few elements that are made more than once.

export function tag(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

// A table row with a cell of that kind for each text.
export function row(kind, texts) {
  const made = document.createElement("tr");
  made.append(...texts.map((text) => tag(kind, text)));
  return made;
}

// A word in a legend, with the colour of what it stands for.
export function key(name, text) {
  const made = tag("span", text);
  made.className = `key ${name}`;
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}
