// The table of devices: filtered, sorted and paged; what is chosen stands in the address, to be shared.

import { address } from "./address.js";
import { bytes, capital, figure, node, span, whole } from "./format.js";
import { deviceButton, rank as trouble } from "./trouble.js";

const ROWS = 50;
const STATES = ["lost", "silent", "quarantined", "gone", "online", "finished"]; // the troubled first
const order = new Intl.Collator("en", { numeric: true });

const COLUMNS = [
  { key: "name", title: "Device", text: () => "", type: "name" },
  { key: "state", title: "State", text: (d) => d.state, type: "state" },
  { key: "trouble", title: "Trouble", text: (d) => (d.troubles ?? []).map((one) => `${one.title}: ${one.words}`).join(" · "), type: "trouble" },
  { key: "tier", title: "Tier", text: (d) => d.tier },
  { key: "heard_unix_s", title: "Last seen", text: (d, now) => `${span(now - d.heard_unix_s)} ago`, type: "num" },
  { key: "samples", title: "Samples", text: (d) => `${whole(d.samples ?? 0)} of ${whole(d.samples_read ?? 0)}`, type: "samples" },
  { key: "bytes_up", title: "Sent", text: (d) => bytes(d.bytes_up ?? 0), type: "num" },
  { key: "bytes_down", title: "Received", text: (d) => bytes(d.bytes_down ?? 0), type: "num" },
  { key: "outbox_bytes", title: "Outbox", text: (d) => bytes(d.outbox_bytes ?? 0), type: "outbox" },
  { key: "weights_version", title: "Version", text: (d) => whole(d.weights_version ?? 0), type: "version" },
  { key: "quality", title: "Accuracy", text: (d) => figure(d.quality), type: "num" },
  { key: "temperature_celsius", title: "°C", text: (d) => (d.temperature_celsius == null ? "–" : d.temperature_celsius.toFixed(0)), type: "num" },
];

export class Table {
  constructor(fleet) {
    this.fleet = fleet;
    this.rows = [];
    this.inputs = { q: "f-name", tier: "f-tier", state: "f-state" };
    for (const [key, id] of Object.entries(this.inputs)) {
      const input = document.getElementById(id);
      this.inputs[key] = input;
      input.addEventListener("input", () => address.choose({ [key]: input.value, page: "" }));
    }
    this.inputs.state.append(...STATES.map((state) => new Option(capital(state), state)));
    document.getElementById("p-back").addEventListener("click", () => address.choose({ page: String(this.page - 1 || "") }));
    document.getElementById("p-next").addEventListener("click", () => address.choose({ page: String(this.page + 1) }));
    this.body = document.querySelector("#table tbody");
    this.head();
    address.addEventListener("change", () => this.read());
    this.read();
  }

  head() {
    const row = node("tr");
    for (const column of COLUMNS) {
      const cell = node("th", ["num", "version", "samples"].includes(column.type) ? "num" : "");
      cell.scope = "col";
      cell.dataset.column = column.key;
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
    const down = !["name", "tier", "state", "trouble"].includes(key);
    const [current, descending] = [address.chosen.sort.replace(/^-/, ""), address.chosen.sort.startsWith("-")];
    const flip = current === key ? !descending : down;
    address.choose({ sort: (flip ? "-" : "") + key, page: "" });
  }

  read() {
    const { chosen } = address;
    for (const [key, input] of Object.entries(this.inputs)) if (input.value !== chosen[key]) input.value = chosen[key];
    this.show();
  }

  matching() {
    const { q, tier, state, sort } = address.chosen;
    const words = q.trim().toLowerCase();
    const key = sort.replace(/^-/, ""), sign = sort.startsWith("-") ? -1 : 1;
    const rank = (device) => ({ trouble: () => trouble(device), state: () => STATES.indexOf(device.state) }[key] ?? (() => device[key]))();
    return [...this.fleet.devices.values()]
      .filter((d) => (!words || d.name.toLowerCase().includes(words)) && (!tier || d.tier === tier) && (!state || d.state === state))
      .sort((a, b) => {
        const [x, y] = [rank(a), rank(b)];
        const both = typeof x === "string" ? order.compare(x, y) : (x ?? -Infinity) - (y ?? -Infinity) || 0;
        return sign * both || (key === "trouble" ? STATES.indexOf(a.state) - STATES.indexOf(b.state) : 0) || order.compare(a.name, b.name) || order.compare(a.tier, b.tier);
      });
  }

  show() {
    const view = this.fleet.view;
    if (!view) return;
    this.offerTiers(view.tiers.map((tier) => tier.name));
    const found = this.matching();
    const pages = Math.max(1, Math.ceil(found.length / ROWS));
    this.page = Math.min(pages - 1, Math.max(0, Number.parseInt(address.chosen.page, 10) || 0));
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
    const [key, down] = [address.chosen.sort.replace(/^-/, ""), address.chosen.sort.startsWith("-")];
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
    select.value = address.chosen.tier;
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
    cells[0].button = deviceButton("", "");
    cells[0].append(cells[0].button);
    return { element, cells };
  }

  fill(row, device, view) {
    COLUMNS.forEach((column, i) => {
      const cell = row.cells[i];
      const text = column.text(device, view.now_unix_s);
      if (cell.words.data !== text) cell.words.data = text;
      cell.dataset.column = column.key;
      let name = { num: "num", version: "num", samples: "num", name: "name" }[column.type] ?? "";
      if (column.type === "name" && cell.button.textContent !== device.name) cell.button.textContent = device.name;
      if (column.type === "name") cell.button.dataset.device = `${device.tier}/${device.name}`;
      if (column.type === "state") name = `state ${STATES.includes(device.state) ? device.state : "gone"}`;
      if (column.type === "trouble") name = `why ${device.troubles?.some((one) => one.severe) ? "severe" : ""}`;
      const wanted = (device.final_only ? view.trainer.finished : view.trainer.published) ?? 0;
      if (column.type === "version" && device.online && (device.weights_version ?? 0) < wanted) {
        name += " behind";
        cell.title = `${whole(wanted - (device.weights_version ?? 0))} records behind the version that it wants`;
      } else cell.removeAttribute("title");
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
