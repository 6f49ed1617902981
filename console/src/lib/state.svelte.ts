// What all pages share: where we are, which product, the theme.
import { api, message, type Product } from './api';

export function stored<T>(name: string, fallback: T): T {
  try {
    const text = localStorage.getItem(`gladad.${name}`);
    return text === null ? fallback : (JSON.parse(text) as T);
  } catch {
    return fallback;
  }
}

export function store(name: string, value: unknown): void {
  try {
    localStorage.setItem(`gladad.${name}`, JSON.stringify(value));
  } catch {
    // a full or forbidden store: the choice lasts as long as the page
  }
}

export type Theme = 'system' | 'light' | 'dark';

export const shared = $state({
  page: 'inspect',
  argument: '',
  products: [] as Product[],
  loaded: false,
  problem: '',
  product: stored<string>('product', ''),
  theme: stored<Theme>('theme', 'system'),
  notice: '',
});

export const PAGES: [string, string][] = [
  ['inspect', 'Inspect'],
  ['teach', 'Teach'],
  ['tune', 'Tune'],
  ['history', 'History'],
  ['models', 'Models'],
];

export function readPlace(): void {
  const [page = '', argument = ''] = location.hash.replace(/^#\/?/, '').split('/');
  shared.page = page || 'inspect';
  shared.argument = decodeURIComponent(argument);
}

export function go(place: string): void {
  location.hash = `#/${place}`;
}

export function choose(product: string): void {
  shared.product = product;
  store('product', product);
}

export function setTheme(theme: Theme): void {
  shared.theme = theme;
  store('theme', theme);
  document.documentElement.dataset.theme = theme;
}

export async function refresh(): Promise<void> {
  try {
    shared.products = await api.products();
    shared.problem = '';
    const known = shared.products.map((product) => product.name);
    if (!known.includes(shared.product)) choose(known[0] ?? '');
  } catch (error) {
    shared.problem = message(error);
  }
  shared.loaded = true;
}

/** Do something again and again while the page is seen, the rarer the longer it takes; returns what ends it. What fails is tried again. */
export function every(milliseconds: number, work: () => Promise<unknown>): () => void {
  let gone = false;
  (async () => {
    for (let wait = milliseconds; ; ) {
      await new Promise((done) => setTimeout(done, wait));
      if (gone) return;
      const began = performance.now();
      if (!document.hidden) await work().catch(() => undefined);
      wait = Math.max(milliseconds, Math.min(10_000, 5 * (performance.now() - began)));
    }
  })();
  return () => (gone = true);
}

let clock: ReturnType<typeof setTimeout>;

/** Say something for a few seconds. */
export function tell(text: string): void {
  shared.notice = text;
  clearTimeout(clock);
  clock = setTimeout(() => (shared.notice = ''), 6000);
}

/** Whether a key press belongs to a field or a button, not to the page. */
export function typing(event: KeyboardEvent): boolean {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return true;
  if (document.querySelector('dialog[open]')) return true;
  const target = event.target as HTMLElement;
  if (target.closest('input:not([type=range]):not([type=checkbox]):not([type=radio]):not([type=file]), textarea, select')) return true;
  if (target.closest('input[type=range], input[type=radio]') && event.key.startsWith('Arrow')) return true;
  if (target.closest('[role=slider]') && (event.key.startsWith('Arrow') || event.key.startsWith('Page'))) return true;
  return [' ', 'Enter'].includes(event.key) && !!target.closest('button, a, summary, input, label, [role=button]');
}
