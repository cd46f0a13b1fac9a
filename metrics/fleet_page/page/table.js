// The table of devices: filtered, sorted and paged; what is chosen stands in the address, to be shared.

import { bytes, capital, figure, node, span, whole } from "./format.js";

const ROWS = 50;
const STATES = ["lost", "silent", "quarantined", "gone", "online", "finished"]; // the troubled first
const FIRST = "state";
const LEFT = ["lost", "silent", "gone"];
const order = new Intl.Collator("en", { numeric: true });

const COLUMNS = [
  { key: "name", title: "Device", text: (d) => d.name, type: "name" },
  { key: "tier", title: "Tier", text: (d) => d.tier },
  { key: "state", title: "State", text: (d) => d.state, type: "state" },
  { key: "heard_unix_s", title: "Last seen", text: (d, now) => `${span(now - d.heard_unix_s)} ago`, type: "num" },
  { key: "samples", title: "Samples", text: (d) => `${whole(d.samples ?? 0)} of ${whole(d.samples_read ?? 0)}`, type: "samples" },
  { key: "bytes_up", title: "Sent", text: (d) => bytes(d.bytes_up ?? 0), type: "num" },
  { key: "bytes_down", title: "Received", text: (d) => bytes(d.bytes_down ?? 0), type: "num" },
  { key: "outbox_bytes", title: "Outbox", text: (d) => bytes(d.outbox_bytes ?? 0), type: "outbox" },
  { key: "weights_version", title: "Version", text: (d) => whole(d.weights_version ?? 0), type: "version" },
  { key: "quality", title: "Accuracy", text: (d) => figure(d.quality), type: "num" },
  { key: "temperature_celsius", title: "°C", text: (d) => (d.temperature_celsius == null ? "–" : d.temperature_celsius.toFixed(0)), type: "num" },
];

// Of a device that is well but cannot use what it reads: after those that are not well.
const trouble = (device) => Math.min(STATES.indexOf(device.state), device.samples_unused ? STATES.indexOf("online") - 0.5 : Infinity);

export class Table {
  constructor(fleet) {
    this.fleet = fleet;
    this.rows = [];
    this.inputs = { q: "f-name", tier: "f-tier", state: "f-state" };
    for (const [key, id] of Object.entries(this.inputs)) {
      const input = document.getElementById(id);
      this.inputs[key] = input;
      input.addEventListener("input", () => this.choose({ [key]: input.value, page: "" }));
    }
    this.inputs.state.append(...STATES.map((state) => new Option(capital(state), state)));
    document.getElementById("p-back").addEventListener("click", () => this.choose({ page: this.page - 1 || "" }));
    document.getElementById("p-next").addEventListener("click", () => this.choose({ page: this.page + 1 }));
    this.body = document.querySelector("#table tbody");
    this.head();
    addEventListener("hashchange", () => this.read());
    this.read();
  }

  head() {
    const row = node("tr");
    for (const column of COLUMNS) {
      const cell = node("th", ["num", "version", "samples"].includes(column.type) ? "num" : "");
      cell.scope = "col";
      const button = node("button", "", column.title);
      button.type = "button";
      button.addEventListener("click", () => this.sortBy(column.key));
      cell.append(button);
      column.cell = cell;
      column.button = button;
      row.append(cell);
    }
    document.querySelector("#table thead").append(row);
  }

  sortBy(key) {
    const down = key !== "name" && key !== "tier" && key !== "state";
    const [current, descending] = [this.chosen.sort.replace(/^-/, ""), this.chosen.sort.startsWith("-")];
    const flip = current === key ? !descending : down;
    this.choose({ sort: (flip ? "-" : "") + key, page: "" });
  }

  read() {
    const given = new URLSearchParams(location.hash.slice(1));
    this.chosen = { q: "", tier: "", state: "", sort: FIRST, page: "" };
    for (const key of Object.keys(this.chosen)) this.chosen[key] = given.get(key) ?? this.chosen[key];
    for (const [key, input] of Object.entries(this.inputs)) if (input.value !== this.chosen[key]) input.value = this.chosen[key];
    this.show();
  }

  choose(change) {
    Object.assign(this.chosen, change);
    const told = Object.entries(this.chosen).filter(([key, value]) => value && !(key === "sort" && value === FIRST));
    history.replaceState(null, "", `#${new URLSearchParams(told)}`);
    this.show();
  }

  matching() {
    const { q, tier, state, sort } = this.chosen;
    const words = q.trim().toLowerCase();
    const key = sort.replace(/^-/, ""), sign = sort.startsWith("-") ? -1 : 1;
    const rank = (device) => (key === "state" ? trouble(device) : device[key]);
    return [...this.fleet.devices.values()]
      .filter((d) => (!words || d.name.toLowerCase().includes(words)) && (!tier || d.tier === tier) && (!state || d.state === state))
      .sort((a, b) => {
        const [x, y] = [rank(a), rank(b)];
        const both = typeof x === "string" ? order.compare(x, y) : (x ?? -Infinity) - (y ?? -Infinity) || 0;
        return sign * both || order.compare(a.name, b.name) || order.compare(a.tier, b.tier);
      });
  }

  show() {
    const view = this.fleet.view;
    if (!view) return;
    this.offerTiers(view.tiers.map((tier) => tier.name));
    const found = this.matching();
    const pages = Math.max(1, Math.ceil(found.length / ROWS));
    this.page = Math.min(pages - 1, Math.max(0, Number.parseInt(this.chosen.page, 10) || 0));
    const shown = found.slice(this.page * ROWS, (this.page + 1) * ROWS);
    while (this.rows.length < shown.length) this.rows.push(this.makeRow());
    this.body.replaceChildren(...this.rows.slice(0, shown.length).map((row) => row.element));
    shown.forEach((device, i) => this.fill(this.rows[i], device, view));
    document.getElementById("table-empty").hidden = found.length > 0;
    document.getElementById("f-count").textContent =
      found.length === this.fleet.devices.size ? `${whole(found.length)} devices` : `${whole(found.length)} of ${whole(this.fleet.devices.size)} devices`;
    document.getElementById("p-page").textContent = `Page ${this.page + 1} of ${pages}`;
    document.getElementById("p-back").disabled = this.page === 0;
    document.getElementById("p-next").disabled = this.page >= pages - 1;
    const [key, down] = [this.chosen.sort.replace(/^-/, ""), this.chosen.sort.startsWith("-")];
    for (const column of COLUMNS) {
      if (column.key === "quality") column.button.textContent = capital(view.measure);
      if (column.key === key) column.cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else column.cell.removeAttribute("aria-sort");
    }
  }

  offerTiers(names) {
    const select = this.inputs.tier;
    if ([...select.options].slice(1).map((option) => option.value).join("/") === names.join("/")) return;
    select.replaceChildren(select.options[0], ...names.map((name) => new Option(name, name)));
    select.value = this.chosen.tier;
  }

  makeRow() {
    const element = node("tr");
    const cells = COLUMNS.map((column) => {
      const cell = node("td");
      if (column.type === "outbox") {
        const meter = node("span", "meter");
        cell.bar = node("i");
        meter.append(cell.bar);
        cell.append(meter);
      }
      cell.words = document.createTextNode("");
      cell.append(cell.words);
      element.append(cell);
      return cell;
    });
    cells[2].why = node("span", "why");
    cells[2].append(cells[2].why);
    return { element, cells };
  }

  fill(row, device, view) {
    COLUMNS.forEach((column, i) => {
      const cell = row.cells[i];
      const text = column.text(device, view.now_unix_s);
      if (cell.words.data !== text) cell.words.data = text;
      let name = { num: "num", version: "num", samples: "num", name: "name" }[column.type] ?? "";
      if (column.type === "state") {
        name = `state ${STATES.includes(device.state) ? device.state : "gone"}`;
        const left = device.online || ["goodbye", device.state].includes(device.reason) ? "" : device.reason;
        const lost = device.samples_lost ? `${whole(device.samples_lost)} samples lost with the trainer's state` : "";
        const unused = device.samples_unused ? `${whole(device.samples_unused)} of ${whole(device.samples_read)} samples not used: ${device.unused_why}` : "";
        cell.why.textContent = [left, lost, unused].filter(Boolean).map((why) => ` · ${why}`).join("");
      }
      if (column.type === "version" && device.online && (device.weights_version ?? 0) < view.trainer.published) {
        name += " behind";
        cell.title = `${whole(view.trainer.published - (device.weights_version ?? 0))} records behind the published version`;
      } else cell.removeAttribute("title");
      if (column.type === "state" && LEFT.includes(device.state)) cell.title = `sidestream trainer forget trainer.toml ${device.name} takes it off the list`;
      if (column.type === "samples") {
        cell.title = device.account ?? "";
        if (device.samples_unused) name += " behind";
      }
      if (column.type === "outbox") {
        const fill = device.outbox_fill ?? 0;
        if (fill > 0.8) name = "full";
        cell.bar.style.width = `${Math.round(fill * 100)}%`;
        cell.title = `${Math.round(fill * 100)} % full`;
      }
      if (cell.className !== name) cell.className = name;
    });
  }
}
