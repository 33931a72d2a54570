"use strict";
// The folder of the page: a reverse proxy may publish the server under a path.
const base = location.pathname.replace(/docs\/?$/, "").replace(/\/?$/, "/");
const byId = id => document.getElementById(id);

for (const link of document.querySelectorAll("a[data-to]")) link.href = base + link.dataset.to;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
