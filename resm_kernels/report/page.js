"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("detail");
  if (!box || !data.cells.length) return;
  const SVG = "http://www.w3.org/2000/svg";
  const cells = [...document.querySelectorAll("td[data-k]")];

  const make = (tag, text, kind) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const shape = (tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Singular values against their place, both logarithmic; y holds 200 log10(s / largest).
  const spectrum = (at, series, largest) => {
    const W = 340, H = 190, L = 46, R = 8, T = 8, B = 26;
    const svg = shape("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "spectrum" });
    const low = Math.min(...series.flat(), -60);
    const right = Math.log10(Math.max(2, at[at.length - 1]));
    const x = (i) => L + (W - L - R) * Math.log10(i) / right;
    const y = (v) => T + (H - T - B) * v / low;
    const top = Math.log10(largest);
    for (let e = Math.ceil(top + low / 200); e <= top; e++) {
      const h = y(200 * (e - top));
      svg.append(shape("line", { x1: L, x2: W - R, y1: h, y2: h, class: "grid" }));
      svg.append(shape("text", { x: L - 5, y: h + 3, "text-anchor": "end" }, "1e" + e));
    }
    svg.append(shape("text", { x: L - 5, y: T + 3, "text-anchor": "end" }, largest.toPrecision(2)));
    for (let i = 1; i <= at[at.length - 1]; i *= 10) {
      svg.append(shape("line", { x1: x(i), x2: x(i), y1: T, y2: H - B, class: "grid" }));
      svg.append(shape("text", { x: x(i), y: H - B + 13, "text-anchor": "middle" }, i));
    }
    svg.append(shape("text", { x: W - R, y: H - 2, "text-anchor": "end" }, "singular value number"));
    series.forEach((values, t) => {
      const points = values.map((v, i) => `${x(at[i]).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
      svg.append(shape("polyline", { points, class: "k" + t % 6 }));
    });
    return svg;
  };

  const table = (head, rows) => {
    const found = make("table", undefined, "list n1");
    const line = (values, tag) => {
      const row = make("tr");
      values.forEach((value, i) => row.append(make(tag, value)));
      return row;
    };
    const top = make("thead"), body = make("tbody");
    top.append(line(head, "th"));
    rows.forEach((row, t) => {
      const made = line([data.names[t], ...row.split("|")], "td");
      made.firstChild.classList.add("dot", "t" + t % 6);
      body.append(made);
    });
    found.append(top, body);
    const scroll = make("div", undefined, "scroll");
    scroll.append(found);
    return scroll;
  };

  const choose = make("select");
  choose.setAttribute("aria-label", "weight");
  data.cells.forEach((cell, k) => {
    const entry = make("option", cell.t);
    entry.value = k;
    choose.append(entry);
  });
  const close = make("button", "close");
  const title = make("h3"), what = make("p", undefined, "soft"), cols = make("div", undefined, "cols");
  const header = make("header");
  header.append(title, choose, close);
  box.replaceChildren(header, what, cols);

  const show = (k) => {
    const cell = data.cells[k];
    title.textContent = cell.t;
    what.textContent = data.texts[cell.s];
    choose.value = k;
    const left = make("div");
    if (cell.r.length) left.append(table(data.head, cell.r));
    const facts = make("div", undefined, "facts");
    for (const [label, text] of cell.f) {
      const line = make("div");
      line.append(make("span", data.texts[label], "soft"), " " + data.texts[text]);
      facts.append(line);
    }
    left.append(facts);
    cols.replaceChildren(left);
    if (cell.y) {
      const at = data.texts[cell.x].split(" ").map(Number);
      let sum;
      const logs = cell.y.map((steps) => (sum = 0, steps.map((step) => (sum += step))));
      cols.append(spectrum(at, logs, cell.m));
    }
    for (const other of cells) other.classList.toggle("on", other.dataset.k === String(k));
  };
  const pick = (td) => {
    show(Number(td.dataset.k));
    box.classList.add("on");
    td.tabIndex = 0;
    td.focus({ preventScroll: true });
  };

  for (const td of cells) td.title = data.cells[td.dataset.k].t + (td.textContent ? "\n" + td.textContent : "");
  for (const map of document.querySelectorAll(".heat")) {
    const first = map.querySelector("td[data-k]");
    if (first) first.tabIndex = 0;
    map.addEventListener("click", (event) => {
      const td = event.target.closest("td[data-k]");
      if (td) pick(td);
    });
    map.addEventListener("keydown", (event) => {
      const td = event.target.closest("td");
      if (!td) return;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        pick(td);
        return;
      }
      const row = td.parentNode, i = td.cellIndex;
      const next = {
        ArrowLeft: row.cells[i - 1],
        ArrowRight: row.cells[i + 1],
        ArrowUp: row.previousElementSibling?.cells[i],
        ArrowDown: row.nextElementSibling?.cells[i],
      }[event.key];
      if (next?.tagName !== "TD") return;
      event.preventDefault();
      td.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
  choose.addEventListener("change", () => show(Number(choose.value)));
  close.addEventListener("click", () => box.classList.remove("on"));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") box.classList.remove("on");
  });
  box.classList.add("ready");
  show(data.first);
})();
