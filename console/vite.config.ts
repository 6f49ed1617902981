import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

// The station answers under the same address; while the pages are being written, `npm run dev` asks the one of GLADAD_URL.
declare const process: { env: Record<string, string | undefined> };

// `--mode report` builds what the page of a report is drawn with: one script, which brings its styles and is written into the page.
const report = {
  outDir: '../src/gladad/report/script',
  lib: { entry: 'src/report/main.ts', formats: ['iife' as const], name: 'gladad', fileName: () => 'page.js' },
};

const pages = { outDir: '../src/gladad/service/console', modulePreload: { polyfill: false } };

export default defineConfig(({ mode }) => ({
  plugins: [svelte(mode === 'report' ? { compilerOptions: { css: 'injected' }, emitCss: false } : {})],
  base: './',
  publicDir: mode === 'report' ? false : 'public',
  build: { ...(mode === 'report' ? report : pages), emptyOutDir: true, target: 'es2022', assetsInlineLimit: 0, reportCompressedSize: false },
  server: { proxy: { '/v1': process.env.GLADAD_URL ?? 'http://127.0.0.1:8000' } },
}));
